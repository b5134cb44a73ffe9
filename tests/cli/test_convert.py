"""Conversion: the file equals what the engine makes in memory; an interrupted one continues; nothing is lost."""

from __future__ import annotations

import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import TinyModels
from lora_files import random_pairs, write
from patience import PATIENCE, eventually
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import build_tiny

from lightx2v.convert import main
from lightx2v.errors import BadRequest, Cancelled, OutputError
from lightx2v.loading.conversion import Conversion, convert
from lightx2v.loading.writer_lock import writer_lock
from lightx2v.models.umt5 import TextEncoder
from lightx2v.progress import CancelToken, Progress
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.lora_match import match_lora
from lightx2v.weights.model_weights import ModelWeights
from lightx2v.weights.quantization import MIN_COSINE, dequantise
from lightx2v.weights.tensor_file import CHUNK


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("lora") / "a_high_noise.safetensors"
    pair = {"up": torch.randn(48, 2, generator=g), "down": torch.randn(2, 24, generator=g)}
    save_file({f"diffusion_model.blocks.1.ffn.0.lora_{k}.weight": v for k, v in pair.items()}, path)
    return path


def in_memory(source: Path, lora: Path | None, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(source)
    weights = ModelWeights.of_expert(checkpoint, quantise=dtype)
    return dict(weights.with_loras([match_lora(lora, weights.shapes, strength=0.5)] if lora else []).tensors())


@pytest.mark.parametrize(("form", "dtype"), [("fp8", torch.float8_e4m3fn), ("int8", torch.int8), ("fp32", None)])
def test_the_file_is_what_would_be_made_in_memory(
    tiny: TinyModels, lora: Path, tmp_path: Path, form: str, dtype: torch.dtype | None
) -> None:
    source, output = tiny.t2v / "high_noise_model", tmp_path / "out.safetensors"
    assert main(["--source", str(source), "--lora", f"{lora}:0.5", "--format", form, "--output", str(output)]) == 0
    want, got = in_memory(source, lora, dtype), load_file(output)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        quantised = tensor.dtype == dtype or name.endswith("_scale")
        if quantised or form == "fp32" or got[name].dtype == torch.float32:
            assert got[name].dtype == tensor.dtype and torch.equal(got[name].float(), tensor.float()), name
        else:
            assert torch.equal(got[name], tensor.bfloat16()), name
    assert got["blocks.0.modulation"].dtype == got["head.head.weight"].dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_cancelled_conversion_continues_where_it_stopped(tiny: TinyModels, lora: Path, tmp_path: Path) -> None:
    source = tiny.t2v / "high_noise_model"
    job = Conversion(source=source, output=tmp_path / "a.safetensors", format="fp8", loras=((lora, 1.0),))
    whole = Conversion(source=source, output=tmp_path / "b.safetensors", format="fp8", loras=((lora, 1.0),))
    token, events = CancelToken(), list[Progress]()

    def stop_halfway(event: Progress) -> None:
        events.append(event)
        if event.step > event.total // 2:
            token.cancel()

    with pytest.raises(Cancelled):
        convert(job, on_progress=stop_halfway, cancel=token)
    part = tmp_path / "a.safetensors.part"
    kept = part.read_bytes()
    assert not job.output.exists() and len(kept) > 1000
    part.write_bytes(kept + b"half a tensor")
    made: list[str] = []
    chunks = ModelWeights.chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ModelWeights, "chunks", lambda self, name, *a, **k: made.append(name) or chunks(self, name, *a, **k)
        )
        convert(job)
    convert(whole)
    assert job.output.read_bytes() == whole.output.read_bytes()
    assert len(made) == len(in_memory(source, None, None)) - len(events)
    assert job.output.read_bytes().startswith(kept)


def test_a_disk_that_fills_up_keeps_what_was_written(tiny: TinyModels, tmp_path: Path) -> None:
    source = tiny.t2v / "high_noise_model"
    job, whole = (Conversion(source=source, output=tmp_path / f"{name}.safetensors", format="fp8") for name in "ab")
    convert(whole)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.output.stat().st_size // 2, hard))
    try:
        with pytest.raises(OutputError, match=r"a\.safetensors could not be written: File too large"):
            convert(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not job.output.exists()
    assert (tmp_path / "a.safetensors.part").stat().st_size == whole.output.stat().st_size // 2
    convert(job)
    assert job.output.read_bytes() == whole.output.read_bytes()


def test_a_part_of_other_sources_is_not_continued(tiny: TinyModels, lora: Path, tmp_path: Path) -> None:
    source, output = tiny.t2v / "high_noise_model", tmp_path / "a.safetensors"
    convert(Conversion(source=source, output=output, format="bf16"))
    output.rename(tmp_path / "a.safetensors.part")
    convert(Conversion(source=source, output=output, format="bf16", loras=((lora, 1.0),)))
    want = in_memory(source, lora, None)["blocks.1.ffn.0.weight"]
    assert not torch.equal(load_file(output)["blocks.1.ffn.0.weight"], want.bfloat16())  # strength 1 and not 0.5
    plain = in_memory(source, None, None)["blocks.1.ffn.0.weight"]
    assert not torch.equal(load_file(output)["blocks.1.ffn.0.weight"], plain.bfloat16())


def test_a_finished_file_is_not_made_twice_and_another_is_not_overwritten(tiny: TinyModels, tmp_path: Path) -> None:
    source, output = tiny.t2v / "high_noise_model", tmp_path / "a.safetensors"
    assert convert(Conversion(source=source, output=output, format="fp8"))
    before = output.stat().st_mtime_ns
    assert not convert(Conversion(source=source, output=output, format="fp8"))
    with pytest.raises(OutputError, match="made of something else"):
        convert(Conversion(source=source, output=output, format="int8"))
    assert output.stat().st_mtime_ns == before
    assert convert(Conversion(source=source, output=output, format="int8"), force=True)


def test_the_text_encoder_is_converted_to_a_file_that_loads(tiny: TinyModels, tmp_path: Path) -> None:
    source, output = tiny.t2v / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "t5.safetensors"
    assert main(["--source", str(source), "--format", "fp8", "--output", str(output)]) == 0
    load = lambda path, **more: TextEncoder.load(path, tiny.t2v / "google/umt5-xxl", dtype=torch.float32, **more)  # noqa: E731
    states = lambda encoder: encoder.encode("a red ball").states_LD  # noqa: E731
    assert torch.equal(states(load(output)), states(load(source, quantise=torch.float8_e4m3fn)))
    with safe_open(output, "pt") as file:
        assert {"blocks.0.attn.q.weight_scale", "token_embedding.weight"} <= set(file.keys())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors"])
def test_a_large_table_goes_through_in_pieces(tmp_path: Path, kind: str) -> None:
    table = torch.randn(5000, 1024).bfloat16()  # 10 MB, in pieces of 4
    tensors = {"token_embedding.weight": table, "norm.weight": torch.ones(1024), "empty": torch.zeros(0, 3)}
    path = tmp_path / f"t5.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pth")
    checkpoint = open_checkpoint(path)
    for dtype in (None, torch.float32):
        pieces = list(checkpoint.chunks("token_embedding.weight", dtype))
        assert len(pieces) > 2 and max(piece.numel() for piece in pieces) * 2 <= CHUNK
        assert torch.equal(torch.cat(pieces), table.flatten().to(dtype or torch.bfloat16))
    whole: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(checkpoint), "tensor", lambda self, name: whole.append(name))
        convert(Conversion(source=path, output=tmp_path / "out.safetensors", format="bf16"))
    got = load_file(tmp_path / "out.safetensors")
    assert torch.equal(got["token_embedding.weight"], table) and got["empty"].shape == (0, 3) and not whole


def test_quantised_files_are_not_converted_back(tiny: TinyModels, lora: Path, tmp_path: Path) -> None:
    convert(Conversion(source=tiny.t2v / "high_noise_model", output=tmp_path / "a.safetensors", format="fp8"))
    for form, says in (("bf16", "cannot be brought back"), ("fp8", "already")):
        with pytest.raises(BadRequest, match=says):
            convert(Conversion(source=tmp_path / "a.safetensors", output=tmp_path / "b.safetensors", format=form))


def test_a_lora_merged_into_8_bit_weights_is_close_to_the_exact_sum(tiny: TinyModels, tmp_path: Path) -> None:
    """Dequantised, added up and quantised again: two roundings, and still within the gate of one."""
    source = tiny.t2v / "high_noise_model"
    pairs = random_pairs(open_checkpoint(source).shapes)
    file = write(tmp_path / "lora.safetensors", pairs)
    convert(Conversion(source=source, output=tmp_path / "fp8.safetensors", format="fp8"))
    job = Conversion(
        source=tmp_path / "fp8.safetensors", output=tmp_path / "merged.safetensors", format="fp8", loras=((file, 1.0),)
    )
    convert(job)
    got, exact = load_file(job.output), in_memory(source, None, None)
    quantised = [name for name, tensor in got.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantised) == 20
    for name in quantised:
        pair = pairs[name.removesuffix(".weight")]
        back = dequantise(got[name], got[f"{name}_scale"])
        want = exact[name] + pair["up"] @ pair["down"]
        assert torch.nn.functional.cosine_similarity(back.flatten(), want.flatten(), dim=0) >= MIN_COSINE, name


def test_a_preset_that_builds_makes_all_its_files(
    tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_tiny(tmp_path / "model")
    settings = f"""{{"model_cls": "wan2.2_moe", "task": "t2v", "model_path": "{model}", "infer_steps": 2,
        "target_video_length": 5, "target_height": 32, "target_width": 32, "build": "fp8", "dit_quantized": true,
        "dit_quant_scheme": "fp8-sgl", "t5_quantized": true, "t5_quant_scheme": "fp8-sgl",
        "lora_configs": [{{"name": "high_noise_model", "path": "{lora}", "strength": 0.5}}]}}"""
    (tmp_path / "mine.json").write_text(settings)
    out = tmp_path / "out"
    assert main(["--preset", str(tmp_path / "mine.json"), "--output", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("high_noise_fp8.safetensors", "low_noise_fp8.safetensors", "t5_fp8.safetensors")
    ]
    assert len(capsys.readouterr().out.splitlines()) == 3
    high = load_file(out / "high_noise_fp8.safetensors")["blocks.1.ffn.0.weight"]
    want = in_memory(model / "high_noise_model", lora, torch.float8_e4m3fn)["blocks.1.ffn.0.weight"]
    assert torch.equal(high.float(), want.float())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_what_stays_float32_in_use_loses_nothing(tmp_path: Path, stored: torch.dtype) -> None:
    source, output = build_tiny(tmp_path / "model", dtype=stored) / "high_noise_model", tmp_path / "out.safetensors"
    convert(Conversion(source=source, output=output, format="fp8"))
    made, original = load_file(output), dict(open_checkpoint(source).tensors())
    for name in ("blocks.0.modulation", "blocks.1.norm3.weight", "time_projection.1.weight", "head.head.bias"):
        assert torch.equal(made[name].float(), original[name].float()), name
    assert made["text_embedding.0.weight"].dtype == torch.bfloat16


def test_a_lora_named_for_the_other_expert_is_merged_with_a_warning(
    tiny: TinyModels, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.safetensors"
    source = str(tiny.t2v / "low_noise_model")
    assert main(["--source", source, "--lora", f"{lora}:0.5", "--output", str(output)]) == 0
    assert "for the other expert" in capsys.readouterr().err and output.exists()


def test_bad_usage_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "x")]) == 2
    assert "either --source" in capsys.readouterr().err
    assert main(["--source", "nowhere", "--output", str(tmp_path / "x")]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_two_at_once_make_one_file_and_both_succeed(
    force: bool, tiny: TinyModels, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    job = Conversion(source=tiny.t2v / "high_noise_model", output=tmp_path / "a.safetensors", format="fp8")
    halfway, go_on = threading.Event(), threading.Event()

    def hold(event: Progress) -> None:
        halfway.set()
        assert go_on.wait(PATIENCE)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(convert, job, on_progress=hold)
        assert halfway.wait(PATIENCE)
        second = pool.submit(convert, job, force=force)
        eventually(lambda: "Another process is writing to" in caplog.text)
        go_on.set()
        assert (first.result(PATIENCE), second.result(PATIENCE)) == (True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert convert(job, force=True), "alone it is made again"


@pytest.mark.slow
def test_who_waits_for_another_conversion_can_be_cancelled(tiny: TinyModels, tmp_path: Path) -> None:
    job = Conversion(source=tiny.t2v / "high_noise_model", output=tmp_path / "a.safetensors", format="fp8")
    token = CancelToken()
    token.cancel()
    with writer_lock(tmp_path / ".a.safetensors.lock", job.output), pytest.raises(Cancelled):
        convert(job, cancel=token)
