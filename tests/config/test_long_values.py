"""Settings of any length and kind: the message names the setting and repeats little of its value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightx2v.config import EngineConfig, Environment, ParallelConfig, Request, resolve
from lightx2v.config.lightx2v_keys import KNOWN
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.errors import LightX2VError

VALUES: dict[str, Any] = {
    "text": "A" * 5000,
    "path": "/" + "/".join(["A" * 200] * 10),
    "name": "A" * 300 + ".json",
    "somebody's home": "~nobody/" + "A" * 300,
    "half a surrogate": "A\ud800B",
    "NUL": "A\0B",
    "escape": "a\x1b[31m\nb",
    "list": ["A" * 5000],
    "many": [1000] * 5000,
    "object": {"A" * 5000: {"A" * 5000: 1}},
    "object with half a surrogate": {"\ud800": "\ud800"},
    "digits": 10**4000,
}
FIXED = 700
"""Characters of a message's own words, and of the lists of names in it."""


def check_message(action: Callable[[], object]) -> None:
    """Either the value is accepted, or one of our errors says little about it."""
    try:
        action()
    except LightX2VError as error:
        message = str(error)
        assert "A" * 101 not in message and len(message) < FIXED + 120, message
        assert message.isprintable() and message.encode()


def fields(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUES)
def test_every_setting_repeats_little_of_a_wrong_value(name: str) -> None:
    value = VALUES[name]
    for key in KNOWN:
        check_message(lambda key=key: resolve("demo_t2v_base", {key: value}))
        check_message(lambda key=key: resolve({"model_cls": "wan2.2_moe", "task": "t2v", key: value}))
    pictures = {"task": "flf2v", "image_path": "a", "last_frame_path": "b"}
    for key in fields(Request):
        check_message(lambda key=key: Request(**{"prompt": "x", key: value}))
        check_message(lambda key=key: Request(**{"prompt": "x", **pictures, key: value}))
    for key in fields(EngineConfig):
        check_message(lambda key=key: EngineConfig(**{key: value}))
    for key in fields(ParallelConfig):
        check_message(lambda key=key: EngineConfig(parallel={key: value}))  # type: ignore[arg-type]
    for key in ("path", "name", "strength", "expert"):
        check_message(lambda key=key: LoraSpec.from_json({"path": "x", key: value}))
    for read in (resolve, Request.from_json, EngineConfig.from_json, LoraSpec.from_json):
        check_message(lambda read=read: read(value))
    if isinstance(value, str):
        check_message(lambda: resolve("demo_t2v_base", {value: 1}))
        check_message(lambda: Request.from_json({"prompt": "x", value: 1}))
        for variable in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
            check_message(lambda variable=variable: Environment.read({variable: value}))


@pytest.mark.parametrize("name", VALUES)
def test_a_preset_file_repeats_little_of_itself(name: str, tmp_path: Path) -> None:
    file = tmp_path / ("p" * 200 + ".json")
    wholes = [
        VALUES[name],
        *({key: VALUES[name]} for key in ("preset", "lora_configs", "parallel", "A" * 400, "\ud800")),
    ]
    wholes += [
        {"preset": {about: VALUES[name]}} for about in ("title", "summary", "task", "variant", "lightx2v", "other")
    ]
    for whole in wholes:
        file.write_text(json.dumps(whole))
        check_message(lambda: resolve(file))
    key = json.dumps("A" * 5000)
    file.write_text(f"{{{key}: 1, {key}: 2}}")
    check_message(lambda: resolve(file))


def test_a_preset_is_for_a_task_that_exists(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"preset": {"task": "v2v"}}')
    with pytest.raises(LightX2VError, match=r"p\.json: preset\.task is 'v2v'; expected t2v, i2v or flf2v"):
        resolve(tmp_path / "p.json")
