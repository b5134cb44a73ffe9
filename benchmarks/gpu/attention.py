"""Self-attention alone, 40 heads of 128: torch's kernels against each other, their error, and what `auto` takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightx2v.attention.sdpa import sdpa

from .bench import Bench
from .model import attention


def forced(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


def run(bench: Bench) -> None:
    config, chosen = bench.sizes.dit, attention(bench)
    kernels: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"torch's choice": sdpa}
    if bench.cuda:
        kernels |= {
            "cuDNN": partial(forced, SDPBackend.CUDNN_ATTENTION),
            "FlashAttention 2": partial(forced, SDPBackend.FLASH_ATTENTION),
        }
    kernels[f"auto: {chosen.name}"] = chosen.fn
    for tokens in bench.sizes.attention:
        torch.manual_seed(0)
        shape = (1, tokens, config.num_heads, config.head_dim)
        q, k, v = (torch.randn(shape, device=bench.device).to(bench.compute) for _ in range(3))
        some = slice(0, min(256, tokens))
        exact = sdpa(q[:, some].float(), k.float(), v.float())
        for name, kernel in kernels.items():
            try:
                error = ((kernel(q, k, v)[:, some].float() - exact).norm() / exact.norm()).item()
                times = bench.timed(partial(kernel, q, k, v), 7)
            except RuntimeError as failure:
                bench.write(f"{name}, {tokens} tokens", tokens=tokens, kernel=name, failed=str(failure)[:200])
                continue
            rate = bench.rate(4 * tokens**2 * config.dim, times["seconds"])
            bench.write(f"{name}, {tokens} tokens", tokens=tokens, kernel=name, error=error, **times, **rate)
