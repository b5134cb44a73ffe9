"""The same with offload, and with settings in place of a configuration file:  python wan_t2v.py [--model_path …]

Weights wait in host memory and come to the GPU expert by expert ("model") or block by block ("block").
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightx2v import LightX2VPipeline

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model_path", default="Wan-AI/Wan2.2-T2V-A14B", help="a folder or a Hub name")
parser.add_argument("--infer_steps", type=int, default=40)
parser.add_argument("--num_frames", type=int, default=81)
parser.add_argument("--height", type=int, default=480)
parser.add_argument("--width", type=int, default=832)
parser.add_argument("--save_result_path", default="outputs/wan_t2v.mp4")
args = parser.parse_args()

with LightX2VPipeline(model_path=args.model_path, model_cls="wan2.2_moe", task="t2v") as pipe:
    pipe.enable_offload(cpu_offload=True, offload_granularity="model")
    pipe.create_generator(
        infer_steps=args.infer_steps,
        num_frames=args.num_frames,
        height=args.height,
        width=args.width,
        guidance_scale=[4.0, 3.0],  # high-noise expert, low-noise expert
        sample_shift=12.0,
    )
    Path(args.save_result_path).parent.mkdir(parents=True, exist_ok=True)
    result = pipe.generate(
        seed=42,
        prompt="Two cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.",
        save_result_path=args.save_result_path,
    )
    print(result.path, result.timings.seconds)
