"""Check that two checkpoints are a pair of experts for a task, from headers and a few small tensors, before loading.

Wan2.2 has one expert for high and one for low noise, with equal shapes. A model of the other task, the same expert
given twice, or the two exchanged would all run without complaint and make bad videos.
"""

import torch

from ..config.architecture import INPUT_CHANNELS, MODEL_KIND
from ..config.lora_names import expert_in, noise_of, pair_expert
from ..errors import CheckpointError, short_path
from .checkpoint import Checkpoint
from .dit_names import wan_names
from .tensor_file import FLOATS

SMALL = 64 << 10
SAMPLES = 12


def check_expert_pair(high: Checkpoint, low: Checkpoint, task: str) -> tuple[str, ...]:
    """Warnings about a probable mix-up. CheckpointError where the pair cannot be right."""
    for expert, checkpoint in (("high", high), ("low", low)):
        _check_task(checkpoint, expert, task)
    if _equal(high, low):
        raise CheckpointError(
            f"The high-noise and the low-noise expert are the same: {short_path(high.path)} and {short_path(low.path)} "
            "hold equal weights. Give each expert its own file."
        )
    by_pair = pair_expert(high.path, low.path)
    said = {"high": by_pair, "low": by_pair and {"high": "low", "low": "high"}[by_pair]}
    return tuple(
        f"The {expert}-noise expert is loaded from {short_path(checkpoint.path)}, which by its name is the "
        f"{other}-noise one. If the two are swapped, the video will be bad."
        for expert, other, checkpoint in (("high", "low", high), ("low", "high", low))
        if (expert_in(" ".join(checkpoint.metadata.values())) or noise_of(checkpoint.path) or said[expert]) == other
    )


def _check_task(checkpoint: Checkpoint, expert: str, task: str) -> None:
    names = {wan: name for name, wan in wan_names(checkpoint.shapes, short_path(checkpoint.path)).items()}
    patch = names.get("patch_embedding.weight")
    if patch is None or len(checkpoint.shapes[patch]) != 5:
        return  # no Wan video model at all: DiTConfig.from_checkpoint tells what is missing
    got, expected = checkpoint.shapes[patch][1], INPUT_CHANNELS[task]
    if got != expected:
        raise CheckpointError(
            f"The {expert}-noise expert {short_path(checkpoint.path)} has {got} input channels "
            f"({MODEL_KIND.get(got, 'another model')}); task {task} needs {expected} ({MODEL_KIND[expected]}). "
            "Use the model for this task, or the task of this model."
        )


def _equal(high: Checkpoint, low: Checkpoint) -> bool:
    """Whether a dozen small tensors, spread over the model, are equal, under any names and in any dtypes of floats. Two
    trained experts differ in every one."""
    if high.path.resolve() == low.path.resolve():
        return True
    ours, theirs = _small_floats(high), _small_floats(low)
    small = sorted(ours.keys() & theirs.keys())
    sample = small[:: max(1, len(small) // SAMPLES)]
    return bool(sample) and all(_values_equal(high.tensor(ours[wan]), low.tensor(theirs[wan])) for wan in sample)


def _small_floats(checkpoint: Checkpoint) -> dict[str, str]:
    """{Wan's name: the file's name}"""
    wan_of, entries = wan_names(checkpoint.shapes), dict(checkpoint.entries())
    return {
        wan: name
        for name, wan in wan_of.items()
        if 0 < entries[name].nbytes <= SMALL and checkpoint.dtypes[name] in FLOATS
    }


def _values_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}:  # both were rounded, each in its way
        return torch.allclose(a.float(), b.float(), rtol=2**-7, atol=2**-24)
    smaller = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(smaller), b.to(smaller))
