"""sol_attn_setting: LightX2V's keys, their checks, and the way through preset and JSON."""

from __future__ import annotations

from typing import Any

import pytest

from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.presets import resolve
from lightx2v.config.sol_attn_setting import SolAttnSetting
from lightx2v.errors import ConfigError

LIGHTX2V = {
    "tau": 0.5,
    "thresh_type": "diag",
    "kv_splits": "auto",
    "sink_tokens": 0,
    "sink_start": None,
    "reorder": "morton3d",
    "dense_steps": 8,
    "dense_layers": [0],
    "dense_backend": "flash_attn3",
    "strict": True,
}


def test_lightx2vs_settings_are_read() -> None:
    engine = resolve({"self_attn_1_type": "sol_attn", "sol_attn_setting": LIGHTX2V}).engine
    wanted = SolAttnSetting(tau=0.5, dense_steps=8, dense_layers=(0,), dense_backend="flash_attn3", strict=True)
    assert engine.self_attn_1_type == "sol_attn" and engine.sol_attn_setting == wanted
    assert EngineConfig.from_json(engine.to_json()) == engine


def test_without_the_key_there_is_no_setting() -> None:
    engine = EngineConfig(self_attn_1_type="sol_attn")
    assert engine.sol_attn_setting is None and engine.to_json()["sol_attn_setting"] is None


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ([0, 1], (0, 1)),
        ("0-1", (0, 1)),
        ("3, 5-7", (3, 5, 6, 7)),
        ([2, "0-1", 2], (0, 1, 2)),
        ((), ()),
        ("", ()),
        (4, (4,)),
    ],
)
def test_blocks_are_numbers_and_ranges(given: Any, layers: tuple[int, ...]) -> None:
    assert SolAttnSetting(dense_layers=given).dense_layers == layers


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tau": -1}, "sol_attn_setting.tau is -1; expected a number from 0 to 10"),
        ({"tau": float("nan")}, "sol_attn_setting.tau"),
        ({"tau": "1"}, "sol_attn_setting.tau is '1'"),
        ({"tau": True}, "sol_attn_setting.tau is True"),
        ({"dense_steps": 1.5}, "sol_attn_setting.dense_steps is 1.5"),
        ({"dense_steps": -1}, "sol_attn_setting.dense_steps is -1"),
        ({"dense_layers": [-1]}, "sol_attn_setting.dense_layers"),
        ({"dense_layers": "3-1"}, "sol_attn_setting.dense_layers"),
        ({"dense_layers": [0.5]}, "sol_attn_setting.dense_layers"),
        ({"dense_layers": [True]}, "sol_attn_setting.dense_layers"),
        ({"dense_layers": None}, "sol_attn_setting.dense_layers"),
        ({"dense_layers": {"0": 1}}, "sol_attn_setting.dense_layers"),
        ({"dense_backend": "sol_attn"}, 'another backend, such as "auto"'),
        ({"dense_backend": "flash"}, "sol_attn_setting.dense_backend: there is no attention backend 'flash'"),
        ({"dense_backend": 3}, "sol_attn_setting.dense_backend is 3"),
        ({"reorder": "hilbert"}, "sol_attn_setting.reorder is 'hilbert'; expected none or morton3d"),
        ({"strict": 1}, "sol_attn_setting.strict is 1"),
        ({"thresh_type": "exact"}, "sol_attn_setting.thresh_type is 'exact'; expected nothing else than 'diag'"),
        ({"sink_tokens": 64}, "nothing else than 0"),
        ({"sink_start": 0}, "nothing else than null"),
        ({"tua": 1}, "sol_attn_setting: unknown key 'tua'. Did you mean 'tau'?"),
        ([], "sol_attn_setting is []"),
        ("tau", "sol_attn_setting is 'tau'"),
    ],
)
def test_a_wrong_setting_is_named(setting: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(sol_attn_setting=setting)
    assert message in str(caught.value)
