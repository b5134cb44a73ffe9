"""GGUF files of the `gguf` package are read; damaged, cut, foreign and split ones are refused with a sentence."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import quantised, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightx2v.errors import CheckpointError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.gguf_header import FLOATS, OTHER_FORMATS, read_gguf_header

WEIGHTS = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def write(path: Path, **metadata: object) -> Path:
    """An F32 vector, a BF16 and a Q8_0 matrix, a Q8_0 tensor that was flattened, and a 5-D one in F16."""
    tensors = {
        "blocks.0.modulation": WEIGHTS[:1],
        "blocks.0.ffn.0.weight": quantised(WEIGHTS, "Q8_0"),
        "blocks.0.ffn.2.weight": WEIGHTS.bfloat16(),
        "flat.weight": quantised(torch.ones(32, 64), "Q8_0"),
        "patch_embedding.weight": torch.ones(4, 16, 1, 2, 2).half(),
    }
    tokens = [f"word {n}" for n in range(40)]
    shape = {"comfy__gguf__orig_shape__flat__weight": [4, 8, 2, 32]}
    return write_gguf(path, tensors, general__file_type=7, tokens=tokens, **shape, **metadata)


def refused(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 600
    return message


def test_names_shapes_and_bytes_are_those_that_were_written(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf"))
    assert checkpoint.metadata["general.architecture"] == "wan" and checkpoint.metadata["general.file_type"] == "7"
    assert "tokens" not in checkpoint.metadata
    assert checkpoint.shapes["patch_embedding.weight"] == (4, 16, 1, 2, 2)
    assert checkpoint.shapes["flat.weight"] == (4, 8, 2, 32)
    assert checkpoint.shapes["blocks.0.ffn.0.weight"] == (8, 64)
    assert checkpoint.blocks["blocks.0.ffn.0.weight"].form.name == "Q8_0"
    blocks = checkpoint.tensor("blocks.0.ffn.0.weight")
    assert np.array_equal(blocks.numpy(), quantised(WEIGHTS, "Q8_0")[0])
    assert torch.equal(checkpoint.memory_map("blocks.0.ffn.0.weight"), blocks)
    assert torch.equal(checkpoint.tensor("blocks.0.modulation"), WEIGHTS[:1])
    assert torch.equal(checkpoint.tensor("blocks.0.ffn.2.weight"), WEIGHTS.bfloat16())
    every = dict(checkpoint.tensors())
    assert every.keys() == checkpoint.shapes.keys()
    assert all(torch.equal(tensor, checkpoint.tensor(name)) for name, tensor in every.items())


def with_format(path: Path, number: int, tensor: str = "blocks.0.ffn.0.weight") -> Path:
    data = bytearray(path.read_bytes())
    at = data.index(tensor.encode()) + len(tensor) + 4 + 16
    assert struct.unpack_from("<I", data, at) == (8,)
    struct.pack_into("<I", data, at, number)
    path.write_bytes(data)
    return path


KNOWN = {8, *FLOATS, 2, 3, 6, 7, 10, 11, 12, 13, 14, 20, 23}


@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType if kind.value not in KNOWN])
def test_a_format_that_is_not_supported_is_named(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    assert OTHER_FORMATS[kind.value] == kind.name
    path = with_format(write(tmp_path / "a.gguf"), kind.value)
    refused(path, f"blocks.0.ffn.0.weight is stored as {kind.name}, which is not supported", "Q4_K")


def test_a_format_of_the_future_is_refused_by_its_number(tmp_path: Path) -> None:
    refused(with_format(write(tmp_path / "a.gguf"), 99), "stored as number 99")


@pytest.mark.parametrize("version", [1, 3, "new"])
def test_blocks_of_another_layout_are_refused_by_their_version(tmp_path: Path, version: object) -> None:
    path = write(tmp_path / "a.gguf", general__quantization_version=version)
    refused(path, f"general.quantization_version {version!r}; 2 is supported")


def test_rows_that_no_block_fits_are_refused(tmp_path: Path) -> None:
    refused(with_format(write(tmp_path / "a.gguf"), 12), "rows of 64, which Q4_K cannot hold")


@pytest.mark.parametrize("keep", [18, 30, 200, 900, -1])
def test_a_cut_file_is_incomplete(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "incomplete", "download it again")


@pytest.mark.parametrize(
    ("version", "word"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian"), (0, "version 0")]
)
def test_other_versions_and_byte_orders_are_named(tmp_path: Path, version: int, word: str) -> None:
    path = write(tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, 4, version)
    path.write_bytes(data)
    refused(path, word)


def raw(path: Path, *, tensors: int, pairs: int, rest: bytes = b"", pad: int = 64) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest + bytes(pad))
    return path


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def info(name: bytes, shape: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)


HOSTILE = {
    "tensor bomb": ({"tensors": 2**63, "pairs": 0}, "claims"),
    "pair bomb": ({"tensors": 0, "pairs": 2**40}, "claims"),
    "long key": ({"tensors": 0, "pairs": 1, "rest": text(b"k", 2**62)}, "bytes"),
    "key that is no text": ({"tensors": 0, "pairs": 1, "rest": text(b"\xff\xfe")}, "UTF-8"),
    "array bomb": ({"tensors": 0, "pairs": 1, "rest": text(b"k") + struct.pack("<IIQ", 9, 4, 2**60)}, "items"),
    "arrays in arrays": ({"tensors": 0, "pairs": 1, "rest": text(b"k") + struct.pack("<IIQ", 9, 9, 1)}, "type 9"),
    "unknown type": ({"tensors": 0, "pairs": 1, "rest": text(b"k") + struct.pack("<I", 77)}, "type 77"),
    "key twice": ({"tensors": 0, "pairs": 2, "rest": 2 * (text(b"k") + struct.pack("<II", 4, 1))}, "twice"),
    "alignment 0": (
        {"tensors": 0, "pairs": 1, "rest": text(b"general.alignment") + struct.pack("<II", 4, 0)},
        "power of two",
    ),
    "alignment as text": (
        {"tensors": 0, "pairs": 1, "rest": text(b"general.alignment") + struct.pack("<I", 8) + text(b"32")},
        "power of two",
    ),
    "no dimensions": ({"tensors": 1, "pairs": 0, "rest": info(b"a", ())}, "0 dimensions"),
    "many dimensions": ({"tensors": 1, "pairs": 0, "rest": info(b"a", (1,) * 9)}, "9 dimensions"),
    "huge shape": ({"tensors": 1, "pairs": 0, "rest": info(b"a", (2**63, 2**63))}, "shape"),
    "no weights": ({"tensors": 1, "pairs": 0, "rest": info(b"a", (0, 4))}, "shape"),
    "past the end": ({"tensors": 1, "pairs": 0, "rest": info(b"a", (4,), offset=1 << 40)}, "incomplete"),
    "between the steps": ({"tensors": 1, "pairs": 0, "rest": info(b"a", (4,), offset=5)}, "no multiple"),
    "overlap": (
        {"tensors": 2, "pairs": 0, "rest": info(b"a", (16,)) + info(b"b", (4,), offset=32), "pad": 256},
        "overlaps",
    ),
    "tensor twice": ({"tensors": 2, "pairs": 0, "rest": 2 * info(b"a", (4,))}, "listed twice"),
    "cut list": ({"tensors": 9, "pairs": 0, "rest": info(b"a", (4,)), "pad": 0}, "incomplete"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_at_no_cost(tmp_path: Path, name: str) -> None:
    content, word = HOSTILE[name]
    path = raw(tmp_path / "m.gguf", **content)  # type: ignore[arg-type]
    tracemalloc.start()
    start = time.thread_time()
    refused(path, "m.gguf", word)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.thread_time() - start < 1
    assert peak < 1 << 20


@pytest.mark.parametrize("shape", [(32, 64), (512, 1, 2, 2), (32, 16, 2, 2), (32, 16, 1, 2, 2)])
@pytest.mark.parametrize("form", ["F32", "Q8_0"])
def test_a_patch_embedding_that_was_flattened_without_a_word_gets_its_shape_back(
    tmp_path: Path, shape: tuple[int, ...], form: str
) -> None:
    weight = torch.arange(2048.0).view(shape)
    stored = quantised(weight.view(32, 64), "Q8_0") if form == "Q8_0" else weight
    name = "model.diffusion_model.patch_embedding"
    path = write_gguf(tmp_path / "a.gguf", {f"{name}.weight": stored, f"{name}.bias": torch.ones(32)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.shapes[f"{name}.weight"] == (32, 16, 1, 2, 2)
    if form == "F32":
        assert torch.equal(checkpoint.tensor(f"{name}.weight").flatten(), weight.flatten())


@pytest.mark.parametrize("shape", [[4, 8, 2, 31], [4, -8, -2, 32], [0], ["x"]])
def test_an_original_shape_of_other_data_is_refused(tmp_path: Path, shape: list[object]) -> None:
    tensors = {"flat.weight": quantised(torch.ones(32, 64), "Q8_0")}
    path = write_gguf(tmp_path / "a.gguf", tensors, comfy__gguf__orig_shape__flat__weight=shape)
    refused(path, "the original shape of flat.weight")


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), whole=st.booleans())
def test_mutated_headers_open_or_are_refused(tmp_path: Path, seed: int, whole: bool) -> None:
    """Bytes flipped, cut, doubled or inserted: a checkpoint or a CheckpointError, at once, never anything else."""
    rng = random.Random(seed)
    path = write(tmp_path / "m.gguf")
    reach = min(entry.start for entry in read_gguf_header(path).tensors.values())
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) if whole else min(reach, len(data)))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 20)]
            case 2:
                data[at:at] = bytes(rng.choices(range(256), k=rng.randint(1, 9)))
            case _:
                data[at:at] = data[at : at + rng.randint(1, 40)]
    path.write_bytes(data)
    start = time.thread_time()
    try:
        read = dict(open_checkpoint(path).tensors())
    except CheckpointError as error:
        assert len(str(error)) < 600
        return
    finally:
        assert time.thread_time() - start < 1
    assert sum(tensor.numel() * tensor.element_size() for tensor in read.values()) < len(data)


# ---- files in parts -------------------------------------------------------------------------------------------------


def split(folder: Path, count: int = 3, **metadata: int) -> list[Path]:
    """One tensor in each part, as llama.cpp's gguf-split writes them."""
    return [
        write_gguf(
            folder / f"wan-{index + 1:05}-of-{count:05}.gguf",
            {f"blocks.{index}.ffn.0.weight": quantised(WEIGHTS + index, "Q8_0")},
            **({"split__no": index, "split__count": count, "split__tensors__count": count} | metadata),
        )
        for index in range(count)
    ]


def test_any_part_of_a_split_file_opens_all_of_them(tmp_path: Path) -> None:
    for part in split(tmp_path):
        checkpoint = open_checkpoint(part)
        assert sorted(checkpoint.shapes) == [f"blocks.{index}.ffn.0.weight" for index in range(3)]
        assert np.array_equal(checkpoint.tensor("blocks.2.ffn.0.weight"), quantised(WEIGHTS + 2, "Q8_0")[0])
    assert len(open_checkpoint(tmp_path)) == 3


def test_parts_that_are_missing_mixed_or_renamed_are_named(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    second.unlink()
    refused(first, "one of 3 parts", "1 are missing", "wan-00002-of-00003.gguf")
    refused(first.rename(tmp_path / "wan.gguf"), "one of 3 parts", "model-00001-of-00002.gguf")
    (tmp_path / "mixed").mkdir()
    mixed = split(tmp_path / "mixed", split__tensors__count=7)
    refused(mixed[0], "hold 3 tensors, expected 7")


def test_two_models_in_one_folder_are_named(tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        write(tmp_path / name)
    refused(tmp_path, "a-Q4_K_M.gguf", "a-Q8_0.gguf", "name a file")
