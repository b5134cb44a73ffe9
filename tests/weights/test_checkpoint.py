"""Opening model files: every layout is read exactly, every broken file is refused with what to do."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import shutil
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import DiTSizes, random_dit, write_shards

from lightx2v.errors import CheckpointError
from lightx2v.weights.checkpoint import Checkpoint, open_checkpoint
from lightx2v.weights.safetensors_reader import DTYPES
from lightx2v.weights.tensor_file import CHUNK

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return random_dit(DiTSizes(), 16, 32, seed=5)


@pytest.fixture
def sharded(tmp_path: Path, weights: Tensors) -> Path:
    write_shards(tmp_path / "model", weights, 3)
    return tmp_path / "model"


def shard(folder: Path, index: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[index]


def assert_same(checkpoint: Checkpoint, expected: Tensors) -> None:
    assert checkpoint.shapes.keys() == expected.keys()
    for name, tensor in checkpoint.tensors():
        assert tensor.dtype == expected[name].dtype == checkpoint.dtypes[name]
        assert tensor.shape == expected[name].shape == checkpoint.shapes[name]
        assert torch.equal(tensor, expected[name])


def refused(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert str(path.parent) not in message, "an absolute path in a message"
    return message


# Layouts


def test_shards_with_an_index(sharded: Path, weights: Tensors) -> None:
    assert_same(open_checkpoint(sharded), weights)


def test_shards_without_an_index(sharded: Path, weights: Tensors) -> None:
    (sharded / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert_same(open_checkpoint(sharded), weights)


def test_a_single_file(tmp_path: Path, weights: Tensors) -> None:
    save_file(weights, tmp_path / "one.safetensors", metadata={"made": "here"})
    checkpoint = open_checkpoint(tmp_path / "one.safetensors")
    assert_same(checkpoint, weights)
    assert checkpoint.metadata == {"made": "here"}


def test_a_folder_split_by_block(tmp_path: Path, weights: Tensors) -> None:
    files: dict[str, Tensors] = {}
    for name, tensor in weights.items():
        stem = f"block_{name.split('.')[1]}" if name.startswith("blocks.") else "non_block"
        files.setdefault(f"{stem}.safetensors", {})[name] = tensor
    for file, part in files.items():
        save_file(part, tmp_path / file)
    assert_same(open_checkpoint(tmp_path), weights)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("new_format", [False, True])
def test_a_pytorch_file(tmp_path: Path, weights: Tensors, wrap: bool, new_format: bool) -> None:
    content = {"state_dict": weights} if wrap else weights
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=new_format)
    assert_same(open_checkpoint(tmp_path / "model.pth"), weights)
    assert_same(open_checkpoint(tmp_path), weights)


def test_the_bytes_decide_the_format_not_the_name(tmp_path: Path, weights: Tensors) -> None:
    save_file(weights, tmp_path / "really_safetensors.pth")
    torch.save(weights, tmp_path / "really_torch")
    assert_same(open_checkpoint(tmp_path / "really_safetensors.pth"), weights)
    assert_same(open_checkpoint(tmp_path / "really_torch"), weights)


@pytest.mark.parametrize("name", ["m.safetensors", "m.SafeTensors"])
def test_a_pickle_that_claims_to_be_safetensors_is_refused(tmp_path: Path, weights: Tensors, name: str) -> None:
    torch.save(weights, tmp_path / name)
    refused(tmp_path / name, name, "refused", "rename it to .pth")


@pytest.mark.parametrize("pad", range(0, 300, 7))
def test_any_header_length_is_recognised(tmp_path: Path, pad: int) -> None:
    """Its first byte may be that of a pickle, a brace or a blank."""
    tensors = {"w" * (1 + pad): torch.arange(3.0)}
    header = json.dumps({next(iter(tensors)): {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + tensors[next(iter(tensors))].numpy().tobytes())
    assert_same(open_checkpoint(path), tensors)


def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    raw = torch.arange(64, dtype=torch.uint8) % 2
    tensors = {key: raw.clone().view(dtype) for key, dtype in DTYPES.items()} | {"scalar": torch.tensor(1.5)}
    path = tmp_path / "all.safetensors"
    save_file(tensors, path)
    checkpoint, library = open_checkpoint(path), load_file(path)
    for name in tensors:
        ours = checkpoint.tensor(name)
        assert (ours.dtype, ours.shape) == (library[name].dtype, library[name].shape)
        assert torch.equal(ours.reshape(-1).view(torch.uint8), library[name].reshape(-1).view(torch.uint8))
        assert torch.equal(
            checkpoint.memory_map(name).reshape(-1).view(torch.uint8), ours.reshape(-1).view(torch.uint8)
        )


def test_empty_tensors_are_tensors(tmp_path: Path) -> None:
    save_file({"none": torch.empty(0, 4), "some": torch.ones(2)}, tmp_path / "m.safetensors")
    assert_same(open_checkpoint(tmp_path / "m.safetensors"), {"none": torch.empty(0, 4), "some": torch.ones(2)})


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_casting_while_reading_is_casting_after_it(tmp_path: Path, name: str) -> None:
    many = torch.randn(CHUNK // 4 * 2 + 5)  # two chunks and a bit
    tensors = {"many": many, "half": torch.randn(3, 2).half(), "whole": torch.arange(4)}
    (save_file if name.endswith("safetensors") else torch.save)(tensors, tmp_path / name)
    got = dict(open_checkpoint(tmp_path / name).tensors(dtype_of=lambda _: torch.bfloat16))
    assert torch.equal(got["many"], many.bfloat16())
    assert torch.equal(got["half"], tensors["half"].bfloat16())
    assert got["whole"].dtype == torch.int64


def test_tensors_belong_to_the_reader(tmp_path: Path) -> None:
    """What is done to a tensor that was read changes neither the next reading nor the file."""
    for name, save in (("m.safetensors", save_file), ("m.pth", torch.save)):
        save({"w": torch.ones(4)}, tmp_path / name)
        checkpoint = open_checkpoint(tmp_path / name)
        checkpoint.tensor("w").zero_()
        assert torch.equal(checkpoint.tensor("w"), torch.ones(4))
        assert torch.equal(open_checkpoint(tmp_path / name).tensor("w"), torch.ones(4))


def test_only_the_tensors_asked_for_are_read(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    shutil.rmtree(sharded)  # so that a file that is touched all the same is missed
    assert list(checkpoint.tensors(())) == []


ODD = {
    "turned": torch.arange(6.0).view(2, 3).t(),
    "tied": torch.arange(6.0)[2:5],
    "negated": torch._neg_view(torch.arange(6.0)),
    "conjugated": torch.arange(6.0).to(torch.complex64).conj(),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(7.0),
    "plain": torch.arange(5, dtype=torch.int16),
}


def test_tensors_of_pytorch_files_are_read_from_their_places(tmp_path: Path) -> None:
    """The bytes at `start` are the values that NumPy reads; views of which that is not true go another way."""
    base = torch.randn(4, 6)
    tensors = ODD | {"base": base, "row": base[1:3], "again": base}
    torch.save(tensors, tmp_path / "m.pth")
    checkpoint = open_checkpoint(tmp_path / "m.pth")
    placed = {name: entry.start for name, entry in checkpoint.entries() if entry.start >= 0}
    assert placed.keys() == tensors.keys() - {"turned", "negated", "conjugated"}
    assert placed["base"] == placed["again"] and placed["row"] == placed["base"] + 24
    data = (tmp_path / "m.pth").read_bytes()
    for name, start in placed.items():
        expected = tensors[name].numpy()
        raw = np.frombuffer(data, expected.dtype, expected.size, start).reshape(expected.shape)
        assert np.array_equal(raw, expected), name
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, name


@pytest.mark.parametrize("odd", ["swapped", "legacy", "unknown"])
def test_pytorch_files_without_known_places_are_read_as_torch_reads_them(
    tmp_path: Path, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pth"
    torch.save({"w": torch.arange(5.0)}, path, _use_new_zipfile_serialization=odd != "legacy")
    expected = torch.arange(5.0)
    if odd == "swapped":
        with zipfile.ZipFile(path) as old:
            records = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, data in records.items():
                swapped = data if "/data/" not in name else np.frombuffer(data, "<f4").astype(">f4").tobytes()
                new.writestr(name, b"big" if name.endswith("byteorder") else swapped)
    if odd == "unknown":
        monkeypatch.setattr("lightx2v.weights.pth_reader._data_start", lambda *_: 7)
    checkpoint = open_checkpoint(path)
    assert [entry.start for _, entry in checkpoint.entries()] == [-1]
    assert torch.equal(checkpoint.tensor("w"), expected)
    assert torch.equal(torch.cat(list(checkpoint.chunks("w"))), expected)
    target = torch.empty(5, dtype=torch.bfloat16)
    read = dict(checkpoint.tensors(dtype_of=lambda _: torch.bfloat16, into=lambda _: target))
    assert read["w"] is target and torch.equal(target, expected.bfloat16())


# C1: incomplete files


@pytest.mark.parametrize("keep", [0, 7, 8, 20, 500, -100, -1])
def test_a_cut_shard_is_named_and_nothing_is_opened(sharded: Path, keep: int) -> None:
    path = shard(sharded, 1)
    data = path.read_bytes()
    path.write_bytes(data[:keep] if keep >= 0 else data[: len(data) + keep])
    message = refused(sharded, path.name, "incomplete", f"got {len(path.read_bytes())} bytes", "download it again")
    assert "index.json says it holds" in message


def test_a_zero_filled_shard_is_incomplete(sharded: Path) -> None:
    path = shard(sharded, 0)
    path.write_bytes(bytes(path.stat().st_size))
    refused(sharded, path.name, "incomplete", "zero", "download it again")


def test_bytes_after_the_end_are_damage(sharded: Path) -> None:
    path = shard(sharded, 0)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")
    refused(sharded, path.name, "damaged", f"got {size + 4} bytes", f"says {size}")


def test_a_file_that_shrinks_while_it_is_read_is_named(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    path = shard(sharded, 2)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="became shorter"):
        list(checkpoint.tensors())


@pytest.mark.parametrize("keep", [0, 10, 100, 1000, -300, -1])
def test_a_cut_pytorch_file_is_refused(tmp_path: Path, weights: Tensors, keep: int) -> None:
    path = tmp_path / "m.pth"
    torch.save(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[:keep] if keep >= 0 else data[: len(data) + keep])
    refused(path, "m.pth", "download it again")


# C2: missing shards


def test_all_missing_shards_are_named_before_anything_is_read(sharded: Path) -> None:
    for index in (2, 0):
        shard(sharded, index).unlink()
    shard(sharded, 0).write_bytes(b"not even looked at")
    refused(sharded, "lacks 2 of 3", "-00001-of-00003.safetensors", "-00003-of-00003.safetensors")


def test_missing_shards_are_noticed_without_an_index(sharded: Path) -> None:
    (sharded / "diffusion_pytorch_model.safetensors.index.json").unlink()
    shard(sharded, 1).unlink()
    refused(sharded, "lacks 1 of 3", "-00002-of-00003.safetensors")


def test_shards_that_do_not_hold_what_the_index_says(sharded: Path) -> None:
    shutil.copy(shard(sharded, 0), shard(sharded, 1))
    refused(sharded, "-00001-of-00003", "-00002-of-00003")
    save_file({"other": torch.ones(1)}, shard(sharded, 1))
    refused(sharded, "-00002-of-00003.safetensors", "does not hold")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_damaged_index(sharded: Path, text: str) -> None:
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    refused(sharded, "index.json", "damaged")


FORGED = "evil\n\x1b[31mERROR forged"


def forged_header(count: int = 1, **more: object) -> bytes:
    """A safetensors file of one tensor, listed `count` times, whose name would add a line to a message."""
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | more)
    header = f"{{{', '.join([f'{json.dumps(FORGED)}: {entry}'] * count)}}}".encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        forged_header(),
        forged_header(2),
        forged_header(dtype="F7"),
        forged_header(dtype=FORGED),
        forged_header(data_offsets=[4, 8]),
        forged_header(shape=[1] * 20),
        forged_header(more=1),
        {FORGED: torch.ones(2)},
        {FORGED: torch.ones(2).to_sparse()},
        {FORGED: 7},
    ],
)
def test_a_tensors_name_cannot_forge_lines_of_a_message(tmp_path: Path, content: bytes | Tensors) -> None:
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert refused(path, "x.pth").isprintable()


@pytest.mark.parametrize("name, file", [(FORGED, "a.safetensors"), ("w", f"{FORGED}.safetensors")])
def test_an_index_cannot_forge_lines_of_a_message(sharded: Path, name: str, file: str) -> None:
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file}}))
    assert refused(sharded, "index.json").isprintable()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b"])
def test_an_index_cannot_point_outside_its_folder(sharded: Path, name: str) -> None:
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    refused(sharded, "outside")


def test_two_models_in_one_folder(tmp_path: Path) -> None:
    for name in ("bf16.safetensors", "fp8.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    refused(tmp_path, "bf16.safetensors", "fp8.safetensors", "name a file")


def test_folders_without_a_model(tmp_path: Path) -> None:
    refused(tmp_path, "holds no model", "*.safetensors", "*.pth", "*.gguf")
    refused(tmp_path / "absent", "does not exist")


# C3: what downloads leave behind


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 57\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\xef\xbb\xbf \n<HTML lang='en'>Not found</HTML>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        *(
            (text, "web page")
            for text in (b"<!-- x --><html><body>", b"<br />\n<b>Warning</b>: fopen", b"<svg width='1'/> ")
        ),
        (
            b'{"error":"Repository not found"}',
            'a text in JSON, as servers answer with an error, not a model: \'{"error":"R',
        ),
        (b'\n["no such file", 404]   ', "a text in JSON"),
        (gzip.compress(b"<html><body>404</body></html>"), "compressed with gzip"),
        (b"GGUF" + bytes(range(40)), "GGUF version"),
        (b"Entry not found and so on", "neither"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_that_is_no_model_is_named_for_what_it_is(tmp_path: Path, content: bytes, word: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, name, word)


# C4: hostile headers


def write_raw(path: Path, header: object, data: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


HOSTILE: list[tuple[str, object, str]] = [
    ("overlap", {"a": entry(0, 8), "b": entry(4, 8)}, "invalid offset for tensor `b`"),
    ("twins", {"a": entry(0, 8), "b": entry(0, 8)}, "invalid offset"),
    ("gap", {"a": entry(4, 8)}, "invalid offset for tensor `a`"),
    ("past the end", {"a": entry(0, 400)}, "incomplete"),
    ("huge shape", {"a": entry(0, 8, [2**62, 2**62])}, "overflow"),
    ("huge side of nothing", {"a": entry(0, 8), "b": entry(8, 8, [2**63, 0])}, "tensor b has the shape"),
    ("huge sides of nothing", {"a": entry(0, 8), "b": entry(8, 8, [0, 2**62, 4])}, "tensor b has the shape"),
    ("too many sides", {"a": entry(0, 8, [2] + [1] * 1000)}, "shape"),
    ("negative", {"a": entry(0, 8, [-2])}, "integer `-2`"),
    ("negative offset", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "integer `-8`"),
    ("backwards", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "invalid offset"),
    ("bool sides", {"a": entry(0, 8, [True, 2])}, "boolean `true`"),
    ("float sides", {"a": entry(0, 8, [2.0])}, "floating point `2.0`"),
    ("wrong size", {"a": entry(0, 8, [3])}, "invalid shape"),
    ("dtype", {"a": entry(0, 8, dtype="F99")}, "F99"),
    ("dtype torch lacks", {"a": entry(0, 8, [16], dtype="F4")}, "dtype F4; supported are"),
    ("dtype kind", {"a": entry(0, 8, dtype=["F32"])}, "invalid type: sequence"),
    ("dtype as a map", {"a": entry(0, 8, dtype={"F32": None})}, "supported are"),
    ("no shape", {"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "missing field `shape`"),
    ("extra key", {"a": {**entry(0, 8), "stride": [1]}}, "exactly dtype, shape and data_offsets"),
    ("not an object", {"a": [0, 8]}, "invalid type: integer `0`"),
    ("a list of the right types", {"a": ["F32", [2], [0, 8]]}, "exactly dtype, shape and data_offsets"),
    ("metadata", {"__metadata__": {"a": 1}, "a": entry(0, 8)}, "expected a string"),
    (
        "twice",
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "the key a occurs twice",
    ),
    ("twice inside", b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', "duplicate field"),
    ("deep", b'{"a":' + b"[" * 200_000 + b"}", "JSON"),
    ("long number", b'{"a":' + b"9" * 100_000 + b"}", "JSON"),
    ("not utf-8", b'{"\xff\xfe":1}', "UTF-8"),
    ("cut JSON", b'{"a":{"dtype":', "JSON"),
]


@pytest.mark.parametrize(("header", "word"), [pytest.param(h, w, id=name) for name, h, w in HOSTILE])
def test_a_hostile_header_is_refused(tmp_path: Path, header: object, word: str) -> None:
    message = refused(write_raw(tmp_path / "m.safetensors", header), "m.safetensors", word)
    assert message.endswith(("download it again.", "Use a file with one of these."))


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1, 17 << 20, 1, 0])
def test_a_header_bomb_costs_nothing(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"a": entry(0, 8)}, length=length)
    tracemalloc.start()
    start = time.thread_time()
    refused(path, "m.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.thread_time() - start < 1
    assert peak < 1 << 20


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), whole=st.booleans())
def test_mutated_headers_open_or_are_refused(tmp_path: Path, seed: int, whole: bool) -> None:
    """Bytes flipped, cut, doubled or inserted: a checkpoint or a CheckpointError, at once, never anything else."""
    rng = random.Random(seed)
    tensors = {"blocks.0.w": torch.ones(3, 2), "blocks.1.w": torch.zeros(4).half(), "norm": torch.ones(1)}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    data = bytearray(path.read_bytes())
    reach = len(data) if whole else 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(reach, len(data)) or 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 20)]
            case 2:
                data[at:at] = bytes(rng.choices(b'0123456789{}[]",:-eE.', k=rng.randint(1, 6)))
            case _:
                data[at:at] = data[at : at + rng.randint(1, 40)]
    path.write_bytes(data)
    start = time.thread_time()
    try:
        checkpoint = open_checkpoint(path)
        read = dict(checkpoint.tensors())
    except CheckpointError:
        return
    finally:
        assert time.thread_time() - start < 1
    assert sum(tensor.numel() * tensor.element_size() for tensor in read.values()) < len(data)


# C8, C9: pickles


class Payload:
    """What a trojan does when it is unpickled; here it only leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "m.SAFETENSORS", "m.bin", "m"])
@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, name: str, form: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps({"w": Payload(mark)}))
    else:
        torch.save({"w": Payload(mark)}, path, _use_new_zipfile_serialization=form == "torch")
    message = refused(path, name)
    assert "refused" in message or "cannot be read" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([torch.ones(1)], "list"),
        ({}, "dict"),
        ({"epoch": 3}, "epoch"),
        ({1: torch.ones(1)}, "names"),
        ({"w": torch.eye(3).to_sparse()}, "dense"),
        ({"w": torch.ones(1).expand(10**9)}, "more than are stored"),
    ],
)
def test_a_pytorch_file_of_something_else(tmp_path: Path, content: object, word: str) -> None:
    torch.save(content, tmp_path / "m.pth")
    refused(tmp_path / "m.pth", "m.pth", word)


def test_an_archive_that_would_grow_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(1 << 20))
    refused(tmp_path / "m.pth", "compressed")


@pytest.mark.parametrize("version", ["2.9.1", "2.5.0+cu124", "1.13", "2.9.0a0+git1234"])
def test_an_old_torch_reads_safetensors_and_no_pickles(
    tmp_path: Path, weights: Tensors, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    torch.save(weights, tmp_path / "m.pth")
    save_file(weights, tmp_path / "m.safetensors")
    monkeypatch.setattr(torch, "__version__", version)
    refused(tmp_path / "m.pth", version, "2.10", "pip install --upgrade torch")
    assert_same(open_checkpoint(tmp_path / "m.safetensors"), weights)


def test_changed_bytes_in_a_pytorch_file_are_an_error(tmp_path: Path) -> None:
    """Of records up to a megabyte, and so of the table of contents, on opening; of larger ones by `verify`."""
    torch.save({"a": torch.ones(40, 40), "b": torch.ones(3)}, tmp_path / "x.pth")
    original = (tmp_path / "x.pth").read_bytes()
    for place in range(0, len(original), 61):
        changed = bytearray(original)
        changed[place] ^= 0xFF
        (tmp_path / "x.pth").write_bytes(changed)
        try:
            checkpoint = open_checkpoint(tmp_path / "x.pth")
        except CheckpointError:
            continue
        assert torch.equal(checkpoint.tensor("a"), torch.ones(40, 40)), place  # padding between the records
        assert torch.equal(checkpoint.tensor("b"), torch.ones(3)), place
    torch.save({"a": torch.ones(600, 600)}, tmp_path / "large.pth")
    changed = bytearray((tmp_path / "large.pth").read_bytes())
    changed[len(changed) // 2] ^= 0xFF
    (tmp_path / "large.pth").write_bytes(changed)
    (file,) = open_checkpoint(tmp_path / "large.pth").files
    with pytest.raises(CheckpointError, match=r"large\.pth is damaged: Bad CRC-32"):
        file.verify()  # type: ignore[attr-defined]


def test_a_pytorch_file_in_the_old_format_that_is_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(8, 8)}, tmp_path / "whole.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in range(1, len(whole), 5):
        (tmp_path / "x.pth").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "x.pth")


def test_an_index_with_an_endless_name_is_an_error(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="too long a name"):
        open_checkpoint(tmp_path)


def test_a_header_of_very_many_tensors_costs_nothing(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.safetensors", {f"blocks.{i}.weight": entry(0, 0, [0]) for i in range(200_000)})
    start = time.thread_time()
    refused(path, "m.safetensors lists 200000 tensors; at most 50000")
    assert time.thread_time() - start < 1
