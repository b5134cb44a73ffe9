"""The table of attention backends, and the choice of the one that runs.

A backend is chosen only if its kernels fit the device, its package imports, and its output agrees with torch's float32
attention on this device: an installed kernel does not always work. `auto` tries the exact backends in the order of AUTO
for the device's architecture, never one that rounds to 8 bits. `auto_fast` takes one that does where it is faster here.
All take and return (B, L, N, H) and have no mask.
"""

import logging
import statistics
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config.attention_names import check_attention_name
from ..config.sol_attn_setting import SolAttnSetting
from ..errors import ConfigError
from . import flash2, flash3, flash3_fp8, flash4, int8_kitchen, sage2, sage3, sol
from .sdpa import Attention, cudnn_sdpa, sdpa
from .self_test import self_test, structured_test

log = logging.getLogger("lightx2v.attention")

Architecture = tuple[int, int]
"""CUDA compute capability: (9, 0) is an H100."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs, and why it was chosen."""

    name: str
    fn: Attention
    reason: str

    @property
    def kernels(self) -> str:
        """The names of all that compute, for what has to give the same bits."""
        return f"{self.name} and {self.fn.dense_name}" if isinstance(self.fn, sol.SolAttention) else self.name

    def in_step(self, step: int, steps: int) -> Attention:
        """What runs in step `step`, counted from 0, of `steps`."""
        return self.fn.in_step(step, steps) if isinstance(self.fn, sol.SolAttention) else self.fn


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """`majors`: the architectures that its kernels are built for; `tolerance`: its largest allowed relative error in
    `test`."""

    load: Callable[[], Any]
    majors: frozenset[int]
    tolerance: float = 0.02
    test: Callable[[Any, torch.device, torch.dtype, int], float] = self_test


TABLE: dict[str, Backend] = {
    "cudnn": Backend(load=lambda: cudnn_sdpa, majors=frozenset({8, 9, 10, 12})),
    "flash_attn2": Backend(load=flash2.load, majors=frozenset({8, 9, 10, 12})),
    "flash_attn3": Backend(load=flash3.load, majors=frozenset({9})),
    "flash_attn4": Backend(load=flash4.load, majors=frozenset({9, 10, 12})),
    "flash_attn3_fp8": Backend(load=flash3_fp8.load, majors=frozenset({9}), tolerance=0.16, test=structured_test),
    "int8_kitchen": Backend(
        load=int8_kitchen.load, majors=frozenset({7, 8, 9, 10, 12}), tolerance=0.06, test=structured_test
    ),
    "sol_attn": Backend(load=sol.load, majors=frozenset({8, 9, 10, 12}), tolerance=0.06, test=sol.self_test),
    "sage_attn2": Backend(load=sage2.load, majors=frozenset({8, 9, 10, 12}), tolerance=0.08),
    "sage_attn3": Backend(load=sage3.load, majors=frozenset({10, 12}), tolerance=0.25),
}
"""All backends except torch_sdpa, which runs everywhere and is the reference for the others."""

AUTO: dict[Architecture, tuple[str, ...]] = {
    (8, 6): ("cudnn",),  # RTX 3090
    (8, 9): ("cudnn",),  # RTX 4090, L40S
    (9, 0): ("flash_attn3", "cudnn"),  # H100, H200: 680 and 570 TFLOP/s; FlashAttention 2, older torch's choice, 350
    (10, 0): ("flash_attn4", "cudnn"),  # B200
    (10, 3): ("flash_attn4", "cudnn"),  # B300
}
"""What `auto` tries before torch_sdpa. On A100 and RTX 5090 torch's own choice is already the fastest exact one."""

FAST: dict[int, tuple[str, ...]] = {
    7: ("int8_kitchen",),  # Turing
    8: ("int8_kitchen",),  # Ampere, Ada
    9: ("flash_attn3_fp8",),  # Hopper: 8-bit integers are no faster than bf16 there
    12: ("int8_kitchen",),  # consumer Blackwell
}
"""What `auto_fast` tries against the best exact backend, by the architecture's first number."""

WORTH_IT = 0.95
"""An 8-bit backend has to take at most this share of the exact one's time."""

KERNEL_FAILURES = (
    ImportError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    subprocess.SubprocessError,
)
"""What third-party kernels raise if they do not fit: wrong wheel, wrong device, no compiler, another signature."""


class Unfit(Exception):
    """A backend cannot run here; the message is the reason."""


def resolve_attention(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    strict: bool = False,
    *,
    head_dim: int = 128,
    sol_setting: SolAttnSetting | None = None,
) -> Choice:
    """The backend called `name`; for `auto`, the best exact one for this device, for `auto_fast` the fastest.

    `sol_setting` is for sol_attn. If the named backend cannot run, the best one that can takes its place, with one
    warning; with `strict` it is a ConfigError. An unknown name is always a ConfigError.
    """
    check_attention_name(name)
    device = torch.device(device)
    if name == "torch_sdpa":
        return Choice(name, sdpa, "asked for")
    if name in ("auto", "auto_fast"):
        best = _best(device, dtype, head_dim)
        return best if name == "auto" else _faster(best, device, dtype, head_dim)
    try:
        fn, proof = _qualify(name, device, dtype, head_dim)
        if name == "sol_attn":
            setting = sol_setting or SolAttnSetting()
            dense = resolve_attention(setting.dense_backend, device, dtype, strict, head_dim=head_dim)
            fn = sol.SolAttention(fn, dense.fn, dense.name, setting)
            proof += f"; {fn.summary}"
        return Choice(name, fn, f"asked for; {proof}")
    except Unfit as unfit:
        if strict:
            raise ConfigError(
                f"The attention backend {name!r} cannot run here: {unfit}. "
                "Use 'auto', install the missing package, or turn attention_strict off."
            ) from None
        best = _best(device, dtype, head_dim)
        log.warning("attention %s cannot run here: %s; using %s instead", name, unfit, best.name)
        return Choice(best.name, best.fn, f"{name} cannot run here: {unfit}; {best.reason}")


def _best(device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    architecture = _architecture(device)
    where = f"sm{architecture[0]}{architecture[1]}" if architecture else device.type
    passed_over = ""
    for name in AUTO.get(architecture, ()) if architecture else ():
        try:
            fn, proof = _qualify(name, device, dtype, head_dim)
            return Choice(name, fn, f"best exact backend on {where}; {proof}{passed_over}")
        except Unfit as unfit:
            passed_over += f"; not {name}: {unfit}"
    return Choice("torch_sdpa", sdpa, f"best exact backend on {where}{passed_over}")


def _faster(best: Choice, device: torch.device, dtype: torch.dtype, head_dim: int) -> Choice:
    """The first 8-bit backend that is faster than `best` on this device, or `best`."""
    architecture, passed_over = _architecture(device), ""
    for name in FAST.get(architecture[0], ()) if architecture else ():
        try:
            fn, proof = _qualify(name, device, dtype, head_dim)
            share = _seconds(fn, device, dtype, head_dim) / _seconds(best.fn, device, dtype, head_dim)
        except Unfit as unfit:
            passed_over += f"; not {name}: {unfit}"
            continue
        except KERNEL_FAILURES as failure:
            passed_over += f"; not {name}: it failed while it was timed ({_one_line(failure)})"
            continue
        if share <= WORTH_IT:
            return Choice(name, fn, f"takes {share:.0%} of the time of {best.name} here, not exact; {proof}")
        passed_over += f"; not {name}: it takes {share:.0%} of that time"
    return Choice(best.name, best.fn, f"{best.reason}{passed_over}")


@torch.no_grad()
def _seconds(fn: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """The median time of attention to a video of 480p, with half of its heads."""
    q_BLNH = torch.randn(1, 32760, 20, head_dim, device=device, dtype=dtype)
    taken = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn(q_BLNH, q_BLNH, q_BLNH)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken[1:])


def _qualify(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Any, str]:
    """The backend's function and the proof that it works here. Raises Unfit with the reason."""
    backend, architecture = TABLE[name], _architecture(device)
    if architecture is None:
        raise Unfit(f"it needs a CUDA device, but this is {device.type}")
    if architecture[0] not in backend.majors:
        built_for = ", ".join(f"sm{major}x" for major in sorted(backend.majors))
        raise Unfit(f"it is built for {built_for}, but this is sm{architecture[0]}{architecture[1]}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise Unfit(f"it computes in bf16 or fp16, not {str(dtype).removeprefix('torch.')}")
    try:
        fn = backend.load()
    except KERNEL_FAILURES as failure:
        raise Unfit(f"its package does not import ({_one_line(failure)})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once for each of its kernels that is not used
            with torch.no_grad():
                error = backend.test(fn, device, dtype, head_dim)
    except KERNEL_FAILURES as failure:
        raise Unfit(f"its self-test failed ({_one_line(failure)})") from None
    if not error <= backend.tolerance:  # NaN fails too
        raise Unfit(f"its self-test is off by {error:.1e}, at most {backend.tolerance:.0e} is allowed")
    return fn, f"self-test off by {error:.1e}"


def _architecture(device: torch.device) -> Architecture | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _one_line(failure: BaseException) -> str:
    text = " ".join(str(failure).split()) or type(failure).__name__
    return text if len(text) <= 160 else text[:159] + "…"
