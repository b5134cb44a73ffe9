"""The table of attention backends, and the choice of the one that runs.

A backend is chosen only if its kernels fit the device, its package imports, and its output agrees with torch's float32
attention on this device: an installed kernel does not always work. `auto` tries the exact backends in the order of AUTO
for the device's architecture, never one that rounds to 8 bits. All take and return (B, L, N, H) and have no mask.
"""

import logging
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..config.attention_names import check_attention_name
from ..errors import ConfigError
from . import flash2, flash3, flash4, sage2, sage3
from .sdpa import Attention, cudnn_sdpa, sdpa

log = logging.getLogger("lightx2v.attention")

Architecture = tuple[int, int]
"""CUDA compute capability: (9, 0) is an H100."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs, and why it was chosen."""

    name: str
    fn: Attention
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """`majors`: the architectures that its kernels are built for; `tolerance`: its largest allowed relative error."""

    load: Callable[[], Attention]
    majors: frozenset[int]
    tolerance: float = 0.02


TABLE: dict[str, Backend] = {
    "cudnn": Backend(load=lambda: cudnn_sdpa, majors=frozenset({8, 9, 10, 12})),
    "flash_attn2": Backend(load=flash2.load, majors=frozenset({8, 9, 10, 12})),
    "flash_attn3": Backend(load=flash3.load, majors=frozenset({9})),
    "flash_attn4": Backend(load=flash4.load, majors=frozenset({9, 10, 12})),
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
    name: str, device: torch.device | str, dtype: torch.dtype, strict: bool = False, *, head_dim: int = 128
) -> Choice:
    """The backend called `name`; for `auto`, the best one for this device.

    If the named backend cannot run, the best one that can takes its place, with one warning; with `strict` it is a
    ConfigError. An unknown name is always a ConfigError.
    """
    check_attention_name(name)
    device = torch.device(device)
    if name == "torch_sdpa":
        return Choice(name, sdpa, "asked for")
    if name == "auto":
        return _best(device, dtype, head_dim)
    try:
        fn, proof = _qualify(name, device, dtype, head_dim)
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


def _qualify(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Attention, str]:
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
            error = self_test(fn, device, dtype, head_dim)
    except KERNEL_FAILURES as failure:
        raise Unfit(f"its self-test failed ({_one_line(failure)})") from None
    if not error <= backend.tolerance:  # NaN fails too
        raise Unfit(f"its self-test is off by {error:.1e}, at most {backend.tolerance:.0e} is allowed")
    return fn, f"self-test off by {error:.1e}"


def self_test(fn: Attention, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Largest relative error against float32, for self- and cross-attention with uneven lengths."""
    generator = torch.Generator("cpu").manual_seed(0)
    worst = 0.0
    for batch, queries, keys in ((1, 640, 640), (1, 391, 77), (2, 129, 513)):
        q_BLNH, k_BLNH, v_BLNH = (
            torch.randn(batch, length, 4, head_dim, generator=generator).to(device, dtype)
            for length in (queries, keys, keys)
        )
        expected = sdpa(q_BLNH.float(), k_BLNH.float(), v_BLNH.float())
        got = fn(q_BLNH, k_BLNH, v_BLNH)
        if got.shape != expected.shape:
            raise ValueError(f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
        error = ((got.float() - expected).norm() / expected.norm()).item()
        worst = max(worst, error) if error == error else error  # a NaN stays
        if worst != worst:
            break
    return worst


def _architecture(device: torch.device) -> Architecture | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _one_line(failure: BaseException) -> str:
    text = " ".join(str(failure).split()) or type(failure).__name__
    return text if len(text) <= 160 else text[:159] + "…"
