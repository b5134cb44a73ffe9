"""Filling a module from a stream of tensors: strict, all or nothing, in the memory of the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightx2v.errors import CheckpointError
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.module_loader import check_fit, load_into, stream_into
from lightx2v.weights.value_check import ValueCheck

ROOT = Path(__file__).parents[2]
Tensors = dict[str, torch.Tensor]


class Net(nn.Module):
    """A layer, a norm, a bare parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 3) for _ in range(4)])
        self.norm = nn.LayerNorm(3)
        self.modulation = nn.Parameter(torch.randn(1, 6, 3))
        self.register_buffer("steps", torch.zeros(2))


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("whole", torch.zeros(2, dtype=torch.int8))
        self.weight_scale = nn.Parameter(torch.zeros(2, 1))


def on_meta(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.device("meta"):
        return kind()


@pytest.fixture
def tensors() -> Tensors:
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) for name, tensor in Net().state_dict().items()}


def fill(module: nn.Module, tensors: Tensors, dtype: torch.dtype = torch.float32) -> None:
    stream_into(module, tensors.items(), dtype_of=lambda _: dtype, device="cpu", check=ValueCheck("some/file"))


def test_values_arrive_in_the_dtype_asked_for_each(tensors: Tensors) -> None:
    net = on_meta()
    dtypes = {name: torch.float32 if "norm" in name else torch.bfloat16 for name in tensors}
    stream_into(net, tensors.items(), dtype_of=dtypes.__getitem__, device="cpu", check=ValueCheck("f"))
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == dtypes[name]
        assert torch.equal(tensor, tensors[name].to(dtypes[name]))
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in net.parameters())


@pytest.mark.parametrize("source", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_is_accepted(tensors: Tensors, source: torch.dtype) -> None:
    net = on_meta()
    fill(net, {name: tensor.to(source) for name, tensor in tensors.items()})
    assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32}


def test_quantised_tensors_keep_their_dtype() -> None:
    given = {
        "weight": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "whole": torch.tensor([1, -5], dtype=torch.int8),
        "weight_scale": torch.rand(2, 1, dtype=torch.float64),
    }
    net = on_meta(Quantized)
    fill(net, given)
    for name in ("weight", "whole"):
        assert torch.equal(net.state_dict()[name].view(torch.uint8), given[name].view(torch.uint8))
    assert net.state_dict()["weight_scale"].dtype == torch.float32


def refused(tensors: Tensors, *words: str, kind: type[nn.Module] = Net) -> None:
    """By the stream and by the comparison of headers alike; and the module stays as empty as it was."""
    net = on_meta(kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    for attempt in (lambda: fill(net, tensors), lambda: check_fit(net, shapes, dtypes, source_name="some/file")):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert all(word in str(caught.value) for word in ("some/file", *words)), caught.value
    assert all(tensor.is_meta for tensor in net.state_dict().values())


def test_missing_and_unexpected_tensors_are_named_and_counted(tensors: Tensors) -> None:
    renamed = {name.replace("layers", "blocks"): tensor for name, tensor in tensors.items()}
    shown = "layers.0.weight, layers.0.bias, layers.1.weight, layers.1.bias, layers.2.weight, …"
    refused(renamed, f"8 missing: {shown}", f"8 unexpected: {shown.replace('layers', 'blocks')}", "another model")


def test_all_kinds_of_misfit_are_in_one_error(tensors: Tensors) -> None:
    tensors["norm.weight"] = torch.randn(7)
    tensors["steps"] = torch.zeros(2, dtype=torch.int64)
    tensors["extra"] = tensors.pop("modulation")
    refused(
        tensors,
        "1 missing: modulation;",
        "1 unexpected: extra;",
        "2 not fitting",
        "norm.weight has shape [7], expected [3]",
        "steps has dtype int64, expected a float",
    )


def test_a_quantised_tensor_needs_a_quantised_slot(tensors: Tensors) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].to(torch.float8_e4m3fn)
    refused(tensors, "norm.weight has dtype float8_e4m3fn, expected a float")
    ordinary = {"weight": torch.ones(2, 2), "whole": torch.ones(2).to(torch.int8), "weight_scale": torch.ones(2, 1)}
    refused(ordinary, "weight has dtype float32, expected float8_e4m3fn", kind=Quantized)


def test_a_tensor_that_comes_twice_is_an_error(tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match=r"norm\.bias came twice"):
        stream_into(
            on_meta(),
            [*tensors.items(), ("norm.bias", tensors["norm.bias"])],
            dtype_of=lambda _: torch.float32,
            device="cpu",
            check=ValueCheck("f"),
        )


def test_a_stream_that_breaks_leaves_nothing_behind(tensors: Tensors) -> None:
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors.items())[:5]
        raise CheckpointError("the disk is gone")

    net = on_meta()
    with pytest.raises(CheckpointError, match="disk"):
        stream_into(net, breaking(), dtype_of=lambda _: torch.float32, device="cpu", check=ValueCheck("f"))
    assert all(tensor.is_meta for tensor in net.state_dict().values())


def test_a_buffer_that_no_file_fills_is_not_left_on_meta(tensors: Tensors) -> None:
    net = on_meta()
    net.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="table"):
        fill(net, tensors)


def test_a_checkpoint_is_loaded_as_it_is(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    net = on_meta()
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    load_into(net, checkpoint, dtype_of=lambda name: torch.float32, device="cpu")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in net.state_dict().items())


def test_a_wrong_model_is_refused_before_it_is_read(tmp_path: Path, tensors: Tensors) -> None:
    path = tmp_path / "m.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, path)
    checkpoint = open_checkpoint(path)
    path.unlink()  # reading would fail with something else
    with pytest.raises(CheckpointError, match="another model"):
        load_into(on_meta(), checkpoint, dtype_of=lambda _: torch.float32, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("tensor_mib", [1, 32])
def test_loading_takes_the_memory_of_the_result(tmp_path: Path, tensor_mib: int) -> None:
    """256 MiB in fp32 become 128 MiB: nothing near the sum of both may ever be resident."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import load_rss
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    load_rss.write_shards(tmp_path, 0.25, tensor_mib, 2)
    code = (
        "import json, pathlib, sys; sys.path[:0] = ['.', 'benchmarks']; import load_rss;"
        f"print(json.dumps(load_rss.measure('ours', pathlib.Path({str(tmp_path)!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    result = json.loads(done.stdout)
    grown = (result["peak"] - result["before"]) / 2**20
    assert 120 < grown < 128 + tensor_mib + 40
