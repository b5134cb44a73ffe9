"""SolAttnSetting: how sparse attention (`sol_attn`) chooses what it computes exactly, under LightX2V's keys."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from ..errors import ConfigError
from .attention_names import check_attention_name
from .checks import Checks

check = Checks(ConfigError)

DENSE_SHARE = 5
"""One in this many steps is exact by default: 10 of 50 in the paper, 8 of 40 in LightX2V, none of 4."""

INERT: dict[str, tuple[Any, ...] | None] = {
    "thresh_type": ("diag",),
    "sink_tokens": (0,),
    "sink_start": (None,),
    "kv_splits": None,
}
"""LightX2V's other keys and the values that are accepted; None accepts any: `kv_splits` changes only the speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolAttnSetting:
    """A block of 64 keys is computed exactly for a block of queries if its mean score is `tau` standard deviations
    above the mean of all; the other blocks count as one key each. So a larger `tau` is faster and less exact.

    The first `dense_steps` steps (None: every fifth of all) and the network's blocks `dense_layers` are computed
    exactly, by `dense_backend`. "morton3d" puts tokens that are near each other in the video into the same block.
    Source: arXiv 2607.24027 and LightX2V's example for Wan. `strict` is `attention_strict` for this backend.
    """

    tau: float = 1.0
    dense_steps: int | None = None
    dense_layers: tuple[int, ...] = (0,)
    dense_backend: str = "auto"
    reorder: Literal["none", "morton3d"] = "morton3d"
    strict: bool = False

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("tau", check.real("sol_attn_setting.tau", self.tau, 0, 10))
        if self.dense_steps is not None:
            check.whole("sol_attn_setting.dense_steps", self.dense_steps, 0, 1000)
        put("dense_layers", _layers(self.dense_layers))
        if not isinstance(self.dense_backend, str):
            check.bad("sol_attn_setting.dense_backend", self.dense_backend, "the name of an attention backend")
        check_attention_name(self.dense_backend, "sol_attn_setting.dense_backend")
        if self.dense_backend == "sol_attn":
            check.bad("sol_attn_setting.dense_backend", self.dense_backend, 'another backend, such as "auto"')
        check.one_of("sol_attn_setting.reorder", self.reorder, ("none", "morton3d"))
        check.flag("sol_attn_setting.strict", self.strict)

    def exact_steps(self, steps: int) -> int:
        """How many of the first of `steps` steps are exact."""
        return steps // DENSE_SHARE if self.dense_steps is None else self.dense_steps

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"dense_layers": list(self.dense_layers)}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """The setting from an object with LightX2V's keys. An unknown key is an error."""
        if not isinstance(data, Mapping):
            check.bad("sol_attn_setting", data, 'an object such as {"tau": 1.0, "dense_steps": 8}')
        given = dict(data)
        for key, inert in INERT.items():
            if key in given and inert is not None and given[key] not in inert:
                name, only = f"sol_attn_setting.{key}", "null" if inert[0] is None else repr(inert[0])
                check.bad(name, given[key], f"nothing else than {only}: it is not supported here")
            given.pop(key, None)
        return cls(**check.known_keys(given, [field.name for field in fields(cls)], "sol_attn_setting"))


def _layers(value: Any) -> tuple[int, ...]:
    """Numbers of blocks from a list of numbers and ranges ("0-1"), or from one such text ("0, 3-5")."""
    found: set[int] = set()
    for item in [value] if isinstance(value, (str, int)) or not isinstance(value, (list, tuple)) else value:
        for part in item.split(",") if isinstance(item, str) else [item]:
            if isinstance(part, str) and (ends := re.fullmatch(r" *([0-9]{1,3})(?: *- *([0-9]{1,3}))? *", part)):
                first, last = int(ends[1]), int(ends[2] or ends[1])
                if first <= last:
                    found.update(range(first, last + 1))
                    continue
            elif isinstance(part, int) and not isinstance(part, bool) and 0 <= part < 1000:
                found.add(part)
                continue
            elif isinstance(item, str) and not item.strip():
                continue
            check.bad("sol_attn_setting.dense_layers", value, 'numbers of blocks, such as [0, 1] or "0-1"')
    return tuple(sorted(found))
