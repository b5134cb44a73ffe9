"""What each shipped preset downloads from the repositories on the Hub: real names and sizes, no bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_models import point_here, quick
from hub_server import HubServer, serving, sha256

from lightx2v.config.presets import list_presets, resolve
from lightx2v.hub import make_plan

GB = 10**9
SHARD = "{}_noise_model/diffusion_pytorch_model-{:05}-of-00006.safetensors"
DISTILLED = "wan2.2_i2v_A14b_{}_noise{}_lightx2v_4step.safetensors"
LORA = "wan2.2_{}_A14b_{}_noise_lora_rank64_lightx2v_4step_{}.safetensors"


def base() -> dict[str, int]:
    """Wan-AI/Wan2.2-…-A14B: both experts in float32, 57.2 GB each, and the shared files."""
    files = {SHARD.format(which, i): 57_200_000_000 // 6 for which in ("high", "low") for i in range(1, 7)}
    for which in ("high", "low"):
        files |= {f"{which}_noise_model/config.json": 250}
        files |= {f"{which}_noise_model/diffusion_pytorch_model.safetensors.index.json": 96_000}
    tokenizer = ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
    files |= {f"google/umt5-xxl/{name}": 1_000_000 for name in tokenizer}
    files |= {"models_t5_umt5-xxl-enc-bf16.pth": 11_360_000_000, "Wan2.1_VAE.pth": 508_000_000}
    return files | {"README.md": 5_000, "assets/logo.png": 60_000, "examples/i2v_input.JPG": 250_000}


def distilled() -> dict[str, int]:
    files: dict[str, int] = {}
    for which in ("high", "low"):
        files |= {DISTILLED.format(which, ""): 28_600_000_000, DISTILLED.format(which, "_int8"): 14_500_000_000}
        files |= {DISTILLED.format(which, "_scaled_fp8_e4m3"): 14_500_000_000}
        files |= {f"wan2.2_i2v_A14b_{which}_noise_lightx2v_4step_720p_260412.safetensors": 57_000_000_000}
        files |= {f"wan2.2_i2v_A14b_{which}_noise_lightx2v_4step_split/block_{i}.safetensors": GB for i in range(40)}
    return files | {"README.md": 5_000}


REPOS = {
    "Wan-AI/Wan2.2-T2V-A14B": base(),
    "Wan-AI/Wan2.2-I2V-A14B": base(),
    "lightx2v/Wan2.2-Distill-Models": distilled(),
    "lightx2v/Wan2.2-Distill-Loras": {
        LORA.format(task, which, date): 1_200_000_000
        for task in ("t2v", "i2v")
        for which in ("high", "low")
        for date in (1022, 1217)
    },
    **{
        f"QuantStack/Wan2.2-{task}-A14B-GGUF": {
            f"{which}Noise/Wan2.2-{task}-A14B-{which}Noise-{mix}.gguf": size
            for which in ("High", "Low")
            for mix, size in (("Q4_K_M", 9_650_000_000), ("Q5_K_M", 10_800_000_000), ("Q8_0", 15_400_000_000))
        }
        for task in ("T2V", "I2V")
    },
    "lightx2v/Encoders": {f"models_t5_umt5-xxl-enc-{kind}.pth": 6_700_000_000 for kind in ("fp8", "int8")},
}
SIZE = {"base": 114 * GB, "loras": 117 * GB, "merged": 57 * GB, "720p": 114 * GB, "fp8": 29 * GB}
"""Bytes of the experts, rounded, by where they come from."""


class Listing(HubServer):
    """Lists REPOS; there is nothing behind it."""

    def listing(self, repo: str) -> dict[str, Any]:
        def entry(path: str, size: int) -> dict[str, Any]:
            lfs = {"size": size, "pointerSize": 130}
            return {"rfilename": path, "size": size, "lfs": lfs | {"sha256": sha256(path.encode())}}

        return {"id": repo, "sha": self.commit, "siblings": [entry(*file) for file in REPOS[repo].items()]}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.delenv("LIGHTX2V_MODELS_DIR", raising=False)
    point_here(monkeypatch, tmp_path / "home")
    with serving(Listing({repo: {} for repo in REPOS})) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", [info.name for info in list_presets() if not info.demo and info.variant != "distill_gguf"]
)
def test_a_preset_downloads_what_it_needs_and_nothing_else(preset: str, server: HubServer) -> None:
    engine = resolve(preset).engine
    plan = make_plan(engine, hub=quick(server), free=lambda path: 10**15)
    if engine.lora_configs:
        kind, repos = "loras", {"lightx2v/Wan2.2-Distill-Loras"}
    elif "distill" in preset:
        kind = next(kind for kind in ("fp8", "720p", "merged") if kind in preset)
        repos = {"lightx2v/Wan2.2-Distill-Models"}
    else:
        kind, repos = "base", set[str]()
    text, encoders = ("fp8", {"lightx2v/Encoders"}) if "fp8" in preset else ("bf16", set[str]())
    base_repo = f"Wan-AI/Wan2.2-{engine.task.upper()}-A14B"
    assert not plan.unavailable and {file.file.repo for file in plan.files} == {base_repo, *repos, *encoders}
    sizes = {file.file.path: file.file.size for file in plan.files}
    rest = {path for path, size in sizes.items() if size < GB}
    assert {"high_noise_model/config.json", "google/umt5-xxl/tokenizer.json", "Wan2.1_VAE.pth"} <= rest
    assert not {"README.md", "assets/logo.png", "examples/i2v_input.JPG"} & rest
    large = set(sizes) - rest - {f"models_t5_umt5-xxl-enc-{text}.pth"}
    assert len(large) == len(sizes) - len(rest) - 1, "one text encoder"
    shards = {SHARD.format(which, i) for which in ("high", "low") for i in range(1, 7)}
    assert large >= shards if kind in ("base", "loras") else not large & shards
    experts = large - shards
    of_each = len(engine.lora_configs) or (0 if kind == "base" else 2)
    assert len(experts) == len({"high_noise" in path for path in experts}) == of_each
    assert all(engine.task in path and ("fp8" in path) == (kind == "fp8") for path in experts)
    expected = SIZE[kind] if of_each != 1 else (SIZE["base"] + SIZE["loras"]) / 2
    assert expected * 0.99 < sum(sizes[path] for path in large) < expected * 1.01
    assert plan.left == sum(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize(("mix", "size"), [("Q4_K_M", 9_650_000_000), ("Q5_K_M", 10_800_000_000)])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_gguf_preset_downloads_two_files_of_its_mix_and_their_loras(
    task: str, mix: str, size: int, server: HubServer
) -> None:
    plan = make_plan(resolve(f"{task}_distill_gguf_{mix[:2].lower()}").engine, hub=quick(server), free=lambda _: 10**15)
    large = {file.file.path: file.file.size for file in plan.files if file.file.size > GB}
    experts = {f"{which}Noise/Wan2.2-{task.upper()}-A14B-{which}Noise-{mix}.gguf": size for which in ("High", "Low")}
    loras = {path: count for path, count in large.items() if "lora" in path}
    assert len(loras) == 2 and {task in path for path in loras} == {True}
    assert large == experts | loras | {"models_t5_umt5-xxl-enc-fp8.pth": 6_700_000_000}
    assert not plan.unavailable and sum(large.values()) / GB == pytest.approx({"Q4_K_M": 28.4, "Q5_K_M": 30.7}[mix])


def test_all_parts_of_a_split_gguf_file_are_downloaded(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"wan-{index:05}-of-00003.gguf": GB for index in (1, 2, 3)}
    monkeypatch.setitem(REPOS, "QuantStack/Wan2.2-T2V-A14B-GGUF", parts | {"wan-00001-of-00002.gguf": GB})
    one = "QuantStack/Wan2.2-T2V-A14B-GGUF/wan-00001-of-00003.gguf"
    engine = resolve("t2v_base", {"high_noise_original_ckpt": one, "low_noise_original_ckpt": one}).engine
    plan = make_plan(engine, hub=quick(server), free=lambda _: 10**15)
    assert {file.file.path for file in plan.files if file.file.path.endswith(".gguf")} == set(parts)
