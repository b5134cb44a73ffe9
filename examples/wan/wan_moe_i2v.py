"""Image to video with Wan2.2-I2V-A14B:  python wan_moe_i2v.py [--image_path …] [--model_path …] [--config_json …]"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightx2v import LightX2VPipeline

PICTURE = Path(__file__).resolve().parents[2] / "assets" / "demo" / "examples" / "red_heart_sunset.png"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model_path", default="Wan-AI/Wan2.2-I2V-A14B", help="a folder or a Hub name")
parser.add_argument("--model_cls", default="wan2.2_moe", help="wan2.2_moe_distill for a 4-step configuration")
parser.add_argument("--config_json", default="i2v_base", help="a preset's name or a JSON file in LightX2V's format")
parser.add_argument("--image_path", default=str(PICTURE))
parser.add_argument("--save_result_path", default="outputs/wan_moe_i2v.mp4")
args = parser.parse_args()

with LightX2VPipeline(model_path=args.model_path, model_cls=args.model_cls, task="i2v") as pipe:
    pipe.create_generator(config_json=args.config_json)
    Path(args.save_result_path).parent.mkdir(parents=True, exist_ok=True)
    result = pipe.generate(
        seed=42,
        prompt="The camera slowly moves closer while the light changes.",
        image_path=args.image_path,
        save_result_path=args.save_result_path,
    )
    print(result.path, result.timings.seconds)
