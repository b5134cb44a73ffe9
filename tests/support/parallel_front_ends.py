"""The programs that users start with torchrun, as cases for one process each. The parallel tests run them."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

PRESET = "demo_t2v_base"
PROMPT = "a red ball rolls left over green grass"


def infer(*arguments: str) -> int:
    from lightx2v.infer import main

    return main([*arguments, "--prompt", PROMPT, "--frames", "5"])


def infer_into(folder: str, *arguments: str) -> int:
    """Without a name for the video, but with a folder."""
    os.environ["LIGHTX2V_OUTPUT_DIR"] = folder
    return infer(*arguments)


def server(port: int, folder: str, *arguments: str) -> int:
    from lightx2v.server.command import main

    return main(["--preset", PRESET, "--port", str(port), "--output_dir", folder, *arguments])


def page(port: int, folder: str) -> None:
    program = Path(__file__).parents[2] / "app.py"
    sys.argv = [str(program), "--port", str(port), "--output_dir", folder]
    runpy.run_path(str(program), run_name="__main__")


def example(folder: str) -> None:
    """The tutorial's Python example on two GPUs, with the demo model."""
    from lightx2v import LightX2VPipeline

    pipe = LightX2VPipeline(model_path="assets/demo/Wan2.2-T2V-Demo", model_cls="wan2.2_moe", task="t2v")
    pipe.enable_parallel(cfg_p_size=2, seq_p_size=1, seq_p_attn_type="ulysses")
    pipe.create_generator(
        attn_mode="torch_sdpa",
        infer_steps=3,
        num_frames=5,
        height=96,
        width=96,
        guidance_scale=[4.0, 3.0],
        sample_shift=5.0,
    )
    pipe.generate(seed=42, prompt=PROMPT, negative_prompt="blurred", save_result_path=str(Path(folder) / "example.mp4"))
