"""Sends a task to the server and says where to look for it:  python post.py [--url …] [--prompt …] [--image_path …]"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

import httpx

PROMPT = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://localhost:8000/v1/tasks/video/")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--image_path", default="", help="a file of yours, or a URL")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--save_result_path", default="./cat_boxing_seed42.mp4", help="what the server calls the video")
    message = vars(parser.parse_args())
    url = message.pop("url")
    if Path(message["image_path"]).is_file():
        message["image_path"] = base64.b64encode(Path(message["image_path"]).read_bytes()).decode()
    key = os.environ.get("LIGHTX2V_API_KEY", "")
    response = httpx.post(url, json=message, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60)
    print(f"response: {response.json()}")
    response.raise_for_status()
    print(f"status: {url.removesuffix('video/')}{response.json()['task_id']}/status")
