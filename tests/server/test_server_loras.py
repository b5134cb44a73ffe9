"""LoRAs over HTTP: listed by name with their trigger words, used by name, and never shown with a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_tree import comfy_tree, style_lora
from served import SIZE, serve


@pytest.mark.slow
def test_loras_are_listed_and_used_by_name(tmp_path: Path) -> None:
    models = comfy_tree(tmp_path)
    style_lora(models)
    with serve(tmp_path / "out", lora_dir=models / "loras") as served:
        answer = served.client.get("/v1/loras")
        assert str(tmp_path) not in answer.text
        loras = {lora["id"]: lora for lora in answer.json()["data"]}
        pair, single = loras["wan2.2_t2v_demo_lightx2v_lora_4step"], loras["watercolour"]
        assert (pair["experts"], len(pair["files"]), pair["task"]) == (["high", "low"], 2, "t2v")
        assert (single["trigger_words"], single["rank"]) == (["wtrclr style", "soft wash"], 16)
        job = served.jobs.get(served.submit(loras=[{"path": pair["id"], "strength": 0.5}]))
        assert job.request.loras is not None
        assert [(lora.expert, lora.strength, Path(lora.path).name) for lora in job.request.loras[-2:]] == [
            ("high", 0.5, "wan2.2_t2v_demo_high_noise_lightx2v_lora_4step.safetensors"),
            ("low", 0.5, "wan2.2_t2v_demo_low_noise_lightx2v_lora_4step.safetensors"),
        ]
        job = served.jobs.get(served.submit(loras=[{"path": "watercolour.safetensors", "name": "low_noise_model"}]))
        assert job.request.loras is not None and job.request.loras[-1].expert == "low"
        body = {"prompt": "a cat", **SIZE, "loras": [{"path": "absent"}]}
        assert served.client.post("/v1/videos", json=body).status_code == 422


def test_a_server_without_loras_lists_none(tmp_path: Path) -> None:
    with serve(tmp_path / "out") as served:
        assert served.client.get("/v1/loras").json() == {"object": "list", "data": []}
        refused = served.client.post("/v1/videos", json={"prompt": "a cat", **SIZE, "loras": [{"path": "x"}]})
        assert refused.status_code == 422 and "--lora_dir" in refused.text
