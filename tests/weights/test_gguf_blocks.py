"""Every block format gives the same float32 bits as the `gguf` package, for random bytes and for edge values."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_files import random_blocks, reference

from lightx2v.config.gguf_formats import MIXES, bytes_per_weight, mix_of
from lightx2v.weights.gguf_blocks import FORMATS, dequantise


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_weights_equal_the_reference_bit_by_bit(name: str) -> None:
    blocks = random_blocks(FORMATS[name], 6, 1024)
    expected = reference(blocks.numpy(), name)
    actual = dequantise(blocks, FORMATS[name]).numpy()
    assert actual.shape == expected.shape == (6, 1024)
    assert np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_one_block_alone_equals_the_reference(name: str) -> None:
    form = FORMATS[name]
    block = random_blocks(form, 4, form.size)[3:]
    assert np.array_equal(dequantise(block, form).numpy(), reference(block.numpy(), name))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_other_dtypes_are_the_float32_weights_rounded_once(name: str) -> None:
    blocks = random_blocks(FORMATS[name], 6, 512, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch.from_numpy(reference(blocks.numpy(), name)).to(dtype)
        assert torch.equal(dequantise(blocks, FORMATS[name], dtype), rounded)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_sizes_and_numbers_are_those_of_the_reference(name: str) -> None:
    form = FORMATS[name]
    kind = GGMLQuantizationType[name]
    assert (form.number, (form.size, form.nbytes)) == (kind.value, quants.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_cpu_dequantises_faster_than_the_reference(name: str) -> None:
    """Measured 2.5 to 10 times as fast (`benchmarks/dequantise.py`); one operation that goes number by number through
    the scales or the table of codes halves it. Both sides take turns, so that other programs slow both."""
    blocks = random_blocks(FORMATS[name], 512, 5120)
    times: dict[str, float] = {"ours": math.inf, "reference": math.inf}
    calls = {"ours": lambda: dequantise(blocks, FORMATS[name]), "reference": lambda: reference(blocks.numpy(), name)}
    for side in [*calls] * 5:
        start = time.perf_counter()
        calls[side]()
        times[side] = min(times[side], time.perf_counter() - start)
    assert times["ours"] * 1.5 < times["reference"]


def test_rows_in_parts_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks(FORMATS["Q4_K"], 7, 512)
    whole = dequantise(blocks, FORMATS["Q4_K"], torch.bfloat16)
    monkeypatch.setattr("lightx2v.weights.gguf_blocks.CPU_WEIGHTS", 512)
    assert torch.equal(dequantise(blocks, FORMATS["Q4_K"], torch.bfloat16), whole)


@pytest.mark.parametrize(("mix", "published"), [("Q4_K_S", 8.75), ("Q4_K_M", 9.65), ("Q5_K_M", 10.8), ("Q8_0", 15.4)])
def test_mixes_have_the_sizes_of_published_files(mix: str, published: float) -> None:
    """QuantStack's Wan2.2-T2V-A14B, in GB: 14.05 billion weights in blocks, and 0.23 in 16 bits."""
    assert 14.05 * bytes_per_weight(mix) + 0.46 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("HighNoise/Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "Q4_K_M"),
        ("wan2.2_i2v_high_noise_14B_q5_k_s.gguf", "Q5_K_S"),
        ("umt5-xxl-encoder-Q8_0.gguf", "Q8_0"),
        ("umt5-xxl-encoder-f16.gguf", "F16"),
        ("gguf-Q6_K", "Q6_K"),
        ("gguf-BF16", "BF16"),
        ("wan-iq4_xs.gguf", "IQ4_XS"),
        ("myQ4_Kmix.gguf", None),
        ("wan2.2.gguf", None),
    ],
)
def test_a_files_name_says_its_mix(name: str, mix: str | None) -> None:
    assert mix_of(name) == mix
    assert mix is None or mix in MIXES
