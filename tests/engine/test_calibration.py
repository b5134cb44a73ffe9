"""The table that calibration measures is that of the residuals, and a run with it skips by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModels
from tiny_runs import experts

from lightx2v import calibrate as command
from lightx2v.config.presets import PRESETS, resolve
from lightx2v.config.request import Request
from lightx2v.config.schedule import schedule_of
from lightx2v.engine.calibration import calibrate
from lightx2v.pipeline import LightX2VPipeline

STEPS = 11


@pytest.mark.parametrize("guidance", [(4.0, 3.0), (1.0, 3.0)])
def test_each_entry_is_the_mean_ratio_of_the_lengths_of_two_residuals(
    tiny: TinyModels, guidance: tuple[float, float]
) -> None:
    engine = resolve({"model_path": str(tiny.t2v)}, {"device": "cpu"}).engine
    request = Request(
        prompt="a red ball", seed=3, height=32, width=48, frames=5, steps=STEPS, shift=5.0, boundary=0.8,
        guidance=guidance,
    )  # fmt: skip
    starts, lengths = list[torch.Tensor](), list[torch.Tensor]()

    def after(module: Any, inputs: Any, output: list[torch.Tensor]) -> None:
        (stream,), (start,) = output, starts
        lengths.append((stream.double() - start.double()).norm(dim=-1))
        starts.clear()

    with LightX2VPipeline.from_config(engine) as pipe:
        pipe.run(request)  # looks at the experts' order, which is no step
        for dit in experts(pipe):
            dit.blocks[0].register_forward_pre_hook(lambda m, inputs: starts.append(inputs[0][0].clone()))
            dit.blocks[-1].register_forward_hook(after)
        table = calibrate(pipe._loaded(), request)
    schedule = schedule_of(request)
    expected = [[1.0] * STEPS for _ in range(2)]
    for step in range(1, STEPS):
        for branch in range(min(schedule.forwards[step - 1 : step + 1])):
            expected[branch][step] = float((lengths[step][branch] / lengths[step - 1][branch]).mean())
    assert torch.allclose(torch.tensor(table), torch.tensor(expected), atol=2e-5)


def test_the_command_writes_a_table_that_a_preset_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    size = ["--height", "32", "--width", "32", "--frames", "1", "--steps", "10"]
    assert command.main(["demo_t2v_base", "--prompt", "a red ball", *size, "--output", str(file)]) == 0
    table = json.loads(file.read_text())
    assert [len(branch) for branch in table] == [10, 10] and all(branch[0] == 1 for branch in table)
    assert resolve("demo_t2v_base", {"magcache_ratios": table}).request["magcache_ratios"] == tuple(map(tuple, table))
    assert capsys.readouterr().out == f"{file}\n"
    assert command.main(["demo_t2v_distill_lora", "--prompt", "a red ball"]) == 2
    assert "makes 4 steps, and MagCache is for base models with 10 steps or more" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_demo_models_tables_are_what_calibration_measures(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another prompt, seed and picture than those of the shipped tables: most numbers are the model's alone. The last
    ones, where almost nothing is left to denoise, differ more."""
    picture = ["--image_path", "assets/demo/examples/red_heart_sunset.png"] if task == "i2v" else []
    words = ["--prompt", "a green star grows on the snow", "--seed", "7"]
    assert command.main([f"demo_{task}_base", *words, *picture]) == 0
    measured = torch.tensor(json.loads(capsys.readouterr().out))
    shipped = torch.tensor(json.loads((PRESETS / f"demo_{task}_base.json").read_text())["magcache_ratios"])
    off = (measured - shipped).abs()
    assert off[:, :15].max() < 0.03 and off.max() < 0.1
