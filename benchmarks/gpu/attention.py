"""Self-attention alone, 40 heads of 128: the installed kernels against each other, their errors, and the choice of
`auto`. For the longest sequence also the device's clock and power during the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightx2v.attention import resolve_attention
from lightx2v.attention.sdpa import Attention, sdpa
from lightx2v.attention.table import TABLE

from .bench import Bench
from .model import FP8, attention

HEADS_FIRST = "cuDNN, heads before tokens"


def forced(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def flash3_fp8() -> Attention:
    """FlashAttention 3 in FP8 with a scale for each head; includes quantizing."""
    from fa3_fwd_interface import flash_attn_func

    def quantise(x_BLNH: Tensor) -> tuple[Tensor, Tensor]:
        scale_BN = x_BLNH.abs().amax((1, 3)).float() / torch.finfo(FP8).max
        return (x_BLNH * (1 / scale_BN)[:, None, :, None].to(x_BLNH.dtype)).to(FP8), scale_BN

    def attend(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        (q, a), (k, b), (v, c) = map(quantise, (q_BLNH, k_BLNH, v_BLNH))
        out = flash_attn_func(q, k, v, q_descale=a, k_descale=b, v_descale=c)
        return out[0] if isinstance(out, tuple) else out

    return attend


def kernels(bench: Bench) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    chosen = attention(bench)
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"torch's choice": sdpa}
    if bench.cuda:
        cudnn = partial(forced, SDPBackend.CUDNN_ATTENTION)
        found |= {"cuDNN": cudnn, "FlashAttention 2": partial(forced, SDPBackend.FLASH_ATTENTION), HEADS_FIRST: cudnn}
        for name in TABLE.keys() - {"cudnn"}:
            choice = resolve_attention(name, bench.device, bench.compute)
            if choice.name == name:
                found[name] = choice.fn
            else:
                bench.write(f"{name} is not here", reason=choice.reason[:200])
        try:
            found["FlashAttention 3, FP8"] = flash3_fp8()
        except ImportError as error:
            bench.write("FlashAttention 3 in FP8 is not here", reason=str(error)[:200])
    return found | {f"auto: {chosen.name}": chosen.fn}


def run(bench: Bench) -> None:
    config = bench.sizes.dit
    known = kernels(bench)
    for tokens in bench.sizes.attention:
        torch.manual_seed(0)
        shape = (1, tokens, config.num_heads, config.head_dim)
        q, k, v = (torch.randn(shape, device=bench.device).to(bench.compute) for _ in range(3))
        some = slice(0, min(256, tokens))
        exact = sdpa(q[:, some].float(), k.float(), v.float())
        for name, kernel in known.items():
            given = (q, k, v)
            if name == HEADS_FIRST:
                given = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in given)
            try:
                error = ((kernel(*given)[:, some].float() - exact).norm() / exact.norm()).item()
                with bench.clock() as clock:
                    times = bench.timed(partial(kernel, *given), 7)
            except RuntimeError as failure:
                bench.write(f"{name}, {tokens} tokens", tokens=tokens, kernel=name, failed=str(failure)[:200])
                continue
            rate = bench.rate(4 * tokens**2 * config.dim, times["seconds"])
            bench.write(f"{name}, {tokens} tokens", tokens=tokens, kernel=name, error=error, **times, **rate, **clock)
