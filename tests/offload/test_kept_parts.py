"""A new engine takes over the text encoder, the VAE and the host memory of the last one, and computes the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.cost.memory_plan import MemoryPlan
from lightx2v.engine import engine as engine_module
from lightx2v.errors import CheckpointError
from lightx2v.models.umt5 import TextEncoder
from lightx2v.offload import resident
from lightx2v.offload.device_copies import HostCopies
from lightx2v.offload.kept_parts import KeptParts
from lightx2v.offload.placement import load_offloaded
from lightx2v.pipeline import LightX2VPipeline
from lightx2v.progress import Progress

pytestmark = pytest.mark.slow

SMALL = {"height": 32, "width": 48, "frames": 5, "steps": 2, "boundary": 0.95, "shift": 5.0}
SWAP = MemoryPlan(mode="swap", resident_blocks=2, text="move", vae="move")
STREAM = replace(SWAP, mode="stream", resident_blocks=0, text="stream", keep_experts=False)


@pytest.fixture
def models(tiny: TinyModels, tmp_path: Path) -> tuple[EngineConfig, EngineConfig, Request]:
    """A model, and another one with other experts (the same, exchanged), text encoder and VAE in the same files."""
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny.t2v.iterdir():
        if not path.name.endswith("_noise_model"):
            (other / path.name).symlink_to(path)
    shutil.copytree(tiny.t2v / "high_noise_model", other / "low_noise_model")
    shutil.copytree(tiny.t2v / "low_noise_model", other / "high_noise_model")
    resolved = [resolve({"model_path": str(path), "device": "cpu"}, SMALL) for path in (tiny.t2v, other)]
    request = Request(**{**resolved[0].request, "prompt": "a red ball", "seed": 3})
    return resolved[0].engine, resolved[1].engine, request


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> Callable[[MemoryPlan | None], None]:
    """Have engines load for this plan, with the CPU as the device; None: everything stays where it is."""

    def choose(plan: MemoryPlan | None) -> None:
        def place(inputs: Any, _: Any) -> Any:
            if plan is None:
                return resident.Resident(inputs)
            return load_offloaded(inputs, MemoryLadder(plan), copies=HostCopies(poison=True))

        monkeypatch.setattr(engine_module, "load_placement", place)

    return choose


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are read from files, as they are."""
    names: list[str] = []
    for name in ("load_text_encoder", "load_vae", "load_expert"):
        original = getattr(resident, name)

        def noting(*args: Any, _original: Any = original, _name: str = name, **more: Any) -> Any:
            names.append(_name.removeprefix("load_"))
            return _original(*args, **more)

        monkeypatch.setattr(resident, name, noting)
    return names


def made(pipe: LightX2VPipeline, request: Request) -> torch.Tensor:
    frames = pipe.run(request, return_frames=True).frames
    assert frames is not None
    return torch.from_numpy(frames)


def fresh(config: EngineConfig, request: Request) -> torch.Tensor:
    with LightX2VPipeline.from_config(config) as pipe:
        return made(pipe, request)


@pytest.mark.parametrize("plan", [None, SWAP, STREAM])
def test_two_models_in_turns_read_their_experts_only_and_make_the_frames_of_fresh_loads(
    models: tuple[EngineConfig, EngineConfig, Request],
    offloading: Callable[[MemoryPlan | None], None],
    read: list[str],
    plan: MemoryPlan | None,
) -> None:
    base, other, request = models
    expected = {config: fresh(config, request) for config in (base, other)}
    assert not torch.equal(expected[base], expected[other])
    offloading(plan)
    pipe = LightX2VPipeline.from_config(base)
    assert torch.equal(made(pipe, request), expected[base])
    slabs = set()
    for config in (other, base):
        kept = pipe.release()
        slabs.add(kept.slabs)
        read.clear()
        pipe = LightX2VPipeline.from_config(config, kept=kept)
        assert read == ["expert", "expert"]
        assert torch.equal(made(pipe, request), expected[config])
    assert len(slabs) == 1, "the same host memory"
    pipe.close()


@pytest.mark.parametrize(("before", "after"), [(None, SWAP), (SWAP, STREAM), (SWAP, None)])
def test_another_place_for_the_parts_gives_the_same_frames(
    models: tuple[EngineConfig, EngineConfig, Request],
    offloading: Callable[[MemoryPlan | None], None],
    read: list[str],
    before: MemoryPlan | None,
    after: MemoryPlan | None,
) -> None:
    base, other, request = models
    expected = fresh(other, request)
    offloading(before)
    pipe = LightX2VPipeline.from_config(base)
    kept = pipe.release()
    offloading(after)
    read.clear()
    with LightX2VPipeline.from_config(other, kept=kept) as pipe:
        again = [] if after is not None else ["text_encoder", "vae"]  # what is packed in host memory cannot stay there
        assert read == [*again, "expert", "expert"]
        assert torch.equal(made(pipe, request), expected)
    assert not kept.parts and kept.slabs is None


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"text_len": 256}, ["text_encoder"]),
        ({"vae_dtype": "bf16"}, ["vae"]),
        ({"dtype": "bf16"}, ["text_encoder"]),
        ({"lora_dynamic_apply": True}, []),
    ],
)
def test_a_part_that_would_be_loaded_in_another_way_is_loaded(
    models: tuple[EngineConfig, EngineConfig, Request], read: list[str], change: dict[str, Any], again: list[str]
) -> None:
    base, _, request = models
    changed = replace(base, **change)
    expected = fresh(changed, request)
    kept = LightX2VPipeline.from_config(base).release()
    read.clear()
    with LightX2VPipeline.from_config(changed, kept=kept) as pipe:
        assert read == [*again, "expert", "expert"]
        assert torch.equal(made(pipe, request), expected)


def test_a_file_that_was_written_anew_is_read_again(
    models: tuple[EngineConfig, EngineConfig, Request], tmp_path: Path, read: list[str]
) -> None:
    base, other, _ = models
    vae = tmp_path / "other" / "Wan2.1_VAE.pth"
    content = vae.read_bytes()
    vae.unlink()
    vae.write_bytes(content)
    kept = LightX2VPipeline.from_config(other).release()
    vae.touch()
    read.clear()
    LightX2VPipeline.from_config(other, kept=kept).close()
    assert read == ["vae", "expert", "expert"]


def test_a_load_that_fails_frees_what_was_kept(
    models: tuple[EngineConfig, EngineConfig, Request], offloading: Callable[[MemoryPlan | None], None]
) -> None:
    base, other, _ = models
    offloading(SWAP)
    kept = LightX2VPipeline.from_config(base).release()
    slabs = kept.slabs
    assert slabs is not None and slabs.nbytes
    with pytest.raises(CheckpointError):
        LightX2VPipeline.from_config(replace(other, model_path="/nowhere"), kept=kept)
    assert not slabs.nbytes and not kept.parts


def test_only_bytes_that_are_read_are_counted(models: tuple[EngineConfig, EngineConfig, Request]) -> None:
    base, other, _ = models
    totals = []
    kept: KeptParts | None = None
    for config in (base, other):
        events: list[Progress] = []
        pipe = LightX2VPipeline.from_config(config, kept=kept, on_progress=events.append)
        totals.append(max(event.total for event in events))
        assert max(event.step for event in events) == totals[-1]
        kept = pipe.release()
    experts = [base.model_path + f"/{which}_noise_model" for which in ("high", "low")]
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little")
        for folder in experts
        for path in Path(folder).glob("*.safetensors")
    )
    size = sum(path.stat().st_size for folder in experts for path in Path(folder).glob("*.safetensors"))
    assert totals[1] == size - headers < totals[0]


def test_the_prompts_of_the_first_request_are_encoded_while_the_experts_are_read(
    models: tuple[EngineConfig, EngineConfig, Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, request = models
    expected = fresh(base, request)
    encoded: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda encoder, text: encoded.append(text) or encode(encoder, text))
    texts = tuple(request.texts.values())
    with LightX2VPipeline.from_config(base, prompts=texts) as pipe:
        assert encoded == [*texts]
        assert torch.equal(made(pipe, request), expected)
        assert encoded == [*texts]
