"""Phase: consecutive steps of a video that one expert makes in one way. A list of phases says who denoises when.

In JSON, as a preset writes it (all keys but `expert` are optional):

    "phases": [
        {"expert": "high", "guidance": 3.5},
        {"expert": "high", "below_timestep": 965, "guidance": 1},
        {"expert": "low", "below_timestep": 800, "guidance": 1}
    ]

A phase begins at the first step below `below_timestep`, or at the step `from_step`, counted from 0. A `boundary` and a
`boundary_step_index` are the two shortest ways to write two phases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from ..errors import BadRequest
from .checks import Checks

check = Checks(BadRequest)

Expert = Literal["high", "low"]
Sampler = Literal["unipc", "euler", "lcm"]

EXPERTS: tuple[Expert, ...] = get_args(Expert)
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
EXPERT_NAMES = {"high": "high", "low": "low", "high_noise_model": "high", "low_noise_model": "low"}
"""How JSON names an expert: our word, or LightX2V's."""
MAX_PHASES = 8
MAX_STEPS = 200
MAX_GUIDANCE = 100.0
TRAIN_STEPS = 1000
"""The timestep of pure noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A `guidance` of None is the request's for this expert, a `sampler` of None the request's.

    A phase with another sampler than the one before it begins without history; else a multistep sampler goes on.
    """

    expert: Expert
    below_timestep: float | None = None
    from_step: int | None = None
    guidance: float | None = None
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        check.one_of("phases: expert", self.expert, EXPERTS)
        if self.below_timestep is not None:
            put("below_timestep", check.real("phases: below_timestep", self.below_timestep, 0.0, TRAIN_STEPS))
        if self.from_step is not None:
            put("from_step", check.whole("phases: from_step", self.from_step, 0, MAX_STEPS))
        if self.guidance is not None:
            put("guidance", check.real("phases: guidance", self.guidance, -MAX_GUIDANCE, MAX_GUIDANCE))
        check.one_of("phases: sampler", self.sampler, (None, *SAMPLERS))

    @property
    def scale(self) -> float:
        """The scale of the guidance; 1, which is none, where nothing says another."""
        return 1.0 if self.guidance is None else self.guidance

    @property
    def guided(self) -> bool:
        """Whether it needs an unconditional forward too. Guidance 1 is v_u + 1 (v_c - v_u): no."""
        return self.scale != 1.0

    def begins(self, step: int, timestep: float) -> bool:
        """Whether the phase has begun at this step, counted from 0."""
        if self.from_step is not None:
            return step >= self.from_step
        return self.below_timestep is None or timestep < self.below_timestep

    def to_json(self) -> dict[str, Any]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        if not isinstance(data, Mapping):
            check.bad("phases", data, 'a list of objects such as {"expert": "low", "below_timestep": 875}')
        check.known_keys(data, [field.name for field in fields(cls)], "phases")
        name = data["expert"] if "expert" in data else None
        if not isinstance(name, str) or name not in EXPERT_NAMES:
            check.bad("phases: expert", name, "high or low")
        return cls(**{**data, "expert": EXPERT_NAMES[name]})


def phases_from(value: Any) -> tuple[Phase, ...] | None:
    """The checked phases of a request: each begins after the one before it, and the high-noise expert comes first."""
    if value is None:
        return None
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or not 1 <= len(value) <= MAX_PHASES:
        check.bad("phases", value, f'null or a list of 1 to {MAX_PHASES} objects such as {{"expert": "high"}}')
    phases = tuple(item if isinstance(item, Phase) else Phase.from_json(item) for item in value)
    for number, phase in enumerate(phases, 1):
        starts = (phase.below_timestep is not None) + (phase.from_step is not None)
        if number == 1 and starts:
            raise BadRequest("phases: phase 1 begins with the video; expected neither below_timestep nor from_step.")
        if number > 1 and starts != 1:
            said = "both" if starts else "none"
            raise BadRequest(f"phases: phase {number} has {said} of below_timestep and from_step; expected one.")
    for number, (one, other) in enumerate(pairwise(phases), 2):
        if (one.expert, other.expert) == ("low", "high"):
            raise BadRequest(
                f"phases: phase {number} is the high-noise expert's, after one of the low-noise expert. Noise only "
                "falls: put the phases of the high-noise expert first."
            )
    _check_order("below_timestep", [-phase.below_timestep for phase in phases if phase.below_timestep is not None])
    _check_order("from_step", [phase.from_step for phase in phases if phase.from_step is not None])
    return phases


def _check_order(name: str, starts: Sequence[float]) -> None:
    if any(one >= other for one, other in pairwise(starts)):
        way = "rise" if name == "from_step" else "fall"
        raise BadRequest(
            f"phases: {name} is {', '.join(f'{abs(start):g}' for start in starts)}; expected numbers that {way} from "
            "phase to phase."
        )
