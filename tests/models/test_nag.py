"""Normalised attention guidance: against its formula in float64, inside of a block, and as runs use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyModels
from offload_toys import CPU, PLANS
from stopped_runs import Shelf, go_on, stop_after
from tiny_runs import latents

from lightx2v.config.presets import resolve
from lightx2v.config.request import DEFAULT_NEGATIVE_PROMPT, Request
from lightx2v.cost.memory_ladder import MemoryLadder
from lightx2v.cost.memory_plan import workload_of
from lightx2v.errors import BadRequest
from lightx2v.models import pointwise
from lightx2v.models.block import Block, Nag, Pass, TextStates
from lightx2v.models.dit import DiTConfig, WanDiT
from lightx2v.offload.device_copies import HostCopies
from lightx2v.offload.offloaded import Offloaded
from lightx2v.pipeline import LightX2VPipeline

SMALL = DiTConfig(dim=24, ffn_dim=48, freq_dim=32, num_heads=2, num_layers=2, text_dim=16, text_len=12)


def away(p: np.ndarray, n: np.ndarray, scale: float, tau: float, alpha: float) -> np.ndarray:
    """The paper's three steps, token by token: extrapolate, limit the L1 norm to tau times that of p, blend."""
    out = np.empty_like(p)
    for at in np.ndindex(p.shape[:-1]):
        guided = p[at] * scale - n[at] * (scale - 1)
        ratio = np.abs(guided).sum() / np.abs(p[at]).sum()
        out[at] = alpha * guided * min(ratio, tau) / ratio + (1 - alpha) * p[at]
    return out


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(11.0, 2.5, 0.25), (5.0, 2.5, 0.125), (3.0, 100.0, 1.0)])
@pytest.mark.parametrize("tokens", [1, 37, pointwise.ROWS + 3])
def test_the_formula(scale: float, tau: float, alpha: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    p = torch.randn(2, tokens, 24, generator=generator)
    n = p + 0.4 * torch.randn(2, tokens, 24, generator=generator) * torch.rand(2, tokens, 1, generator=generator)
    expected = torch.from_numpy(away(p.double().numpy(), n.double().numpy(), scale, tau, alpha))
    limited = (expected - p).norm(dim=-1) > 0
    assert limited.any()
    with torch.no_grad():
        got = pointwise.avoid(p.clone(), n, scale, tau, alpha)
        short = pointwise.avoid(p.bfloat16(), n.bfloat16(), scale, tau, alpha)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert short.dtype == torch.bfloat16 and (short - expected).norm() < 2e-2 * scale * expected.norm()


def test_a_token_that_reads_nothing_stays_nothing() -> None:
    with torch.no_grad():
        assert torch.equal(
            pointwise.avoid(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), 11.0, 2.5, 0.25), torch.zeros(1, 2, 8)
        )


@torch.no_grad()
@pytest.mark.parametrize("chunk", [5, 100])
def test_in_a_block_each_token_goes_away_from_what_it_reads_in_the_negative_prompt(chunk: int) -> None:
    torch.manual_seed(0)
    block = Block(24, 48, 2, 1e-6)
    prompt, negative = (torch.randn(1, rows, 24) for rows in (6, 4))
    states = TextStates(prompt, 1, keep=False, negative=TextStates(negative, 1, keep=False), nag=Nag(11.0, 2.5, 0.25))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = torch.einsum("blnh,bmnh->bnlm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bnlm,bmnh->blnh", weights.softmax(-1), v)

    shared = Pass(
        modulation_B6D=torch.randn(1, 6, 24), rotations_L1P=torch.ones(17, 1, 6, dtype=torch.complex64),
        groups=((states,),), self_attention=attend, cross_attention=attend, dtype=torch.float32, chunk=chunk,
    )  # fmt: skip
    asked, read = list[torch.Tensor](), list[torch.Tensor]()
    block.cross_attn.q.register_forward_pre_hook(lambda m, inputs: asked.append(inputs[0].clone()))
    block.cross_attn.o.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0].clone()))
    block([torch.randn(1, 17, 24)], 0, shared)
    q = block.cross_attn.queries(torch.cat(asked, 1)).double()
    p, n = (
        attend(q, *(each.double() for each in block.cross_attn.keys_values(rows))).flatten(2).numpy()
        for rows in (prompt, negative)
    )
    assert np.abs(torch.cat(read, 1).numpy() - away(p, n, 11.0, 2.5, 0.25)).max() < 1e-5


@torch.no_grad()
def test_both_prompts_keys_and_values_are_kept() -> None:
    dit = WanDiT(SMALL)
    prompt, negative = torch.randn(5, 16), torch.randn(3, 16)
    states = dit.encode_text(prompt, negative_LD=negative, nag=Nag(11.0, 2.5, 0.25))
    latents_, calls = torch.randn(16, 2, 4, 6), list[int]()
    dit.blocks[0].cross_attn.k.register_forward_hook(lambda *_: calls.append(1))
    first = dit(latents_, 900.0, [states])[0]
    assert torch.equal(dit(latents_, 900.0, [states])[0], first) and len(calls) == 2
    plain, same = dit.encode_text(prompt), dit.encode_text(prompt, negative_LD=prompt, nag=Nag(11.0, 2.5, 0.25))
    assert not torch.allclose(dit(latents_, 900.0, [plain])[0], first)
    assert torch.allclose(dit(latents_, 900.0, [same])[0], dit(latents_, 900.0, [plain])[0], atol=1e-5)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tiny: TinyModels) -> Iterator[LightX2VPipeline]:
    engine = resolve({"model_path": str(tiny.t2v)}, {"device": "cpu"}).engine
    with LightX2VPipeline.from_config(engine) as pipe:
        yield pipe


DISTILLED = Request(
    prompt="a red ball", seed=3, height=32, width=48, frames=5, denoising_step_list=[1000, 750, 500, 250],
    boundary_step_index=2, enable_cfg=False, negative_prompt="blue", nag_scale=11.0,
)  # type: ignore[arg-type]  # fmt: skip


def test_without_guidance_the_negative_prompt_works(pipe: LightX2VPipeline) -> None:
    blue, off = latents(pipe, DISTILLED), latents(pipe, replace(DISTILLED, nag_scale=1.0))
    green = latents(pipe, replace(DISTILLED, negative_prompt="green"))
    assert not torch.equal(blue, green) and not torch.equal(blue, off)
    assert torch.equal(off, latents(pipe, replace(DISTILLED, nag_scale=1.0, negative_prompt="green")))
    assert torch.equal(latents(pipe, replace(DISTILLED, nag_alpha=0.0)), off)
    assert torch.equal(latents(pipe, DISTILLED), blue)


def test_a_guided_phase_is_as_it_was_and_the_other_one_avoids(pipe: LightX2VPipeline) -> None:
    """Guidance has the negative prompt already: NAG works in the phases that have none."""
    guided = replace(DISTILLED, enable_cfg=True, guidance=(4.0, 3.0))
    assert not guided.nag and torch.equal(latents(pipe, guided), latents(pipe, replace(guided, nag_scale=1.0)))
    one = replace(DISTILLED, enable_cfg=True, guidance=(4.0, 1.0))
    assert one.nag and not torch.equal(latents(pipe, one), latents(pipe, replace(one, nag_scale=1.0)))


def test_the_negative_prompt_is_encoded_where_it_is_used() -> None:
    assert (
        DISTILLED.negative_text == "blue"
        and replace(DISTILLED, negative_prompt="").negative_text == DEFAULT_NEGATIVE_PROMPT
    )
    assert replace(DISTILLED, nag_scale=1.0).negative_text is None
    assert workload_of(DISTILLED).avoided == 1 and workload_of(replace(DISTILLED, nag_scale=1.0)).avoided == 0
    assert Request.from_json(DISTILLED.to_json()) == DISTILLED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nag_scale": 0.5}, "nag_scale is 0.5; expected a number from 1 to 100. Nearest valid value: 1"),
        ({"nag_scale": True}, "nag_scale is True"),
        ({"nag_tau": -1}, "nag_tau is -1"),
        ({"nag_alpha": 1.5}, "nag_alpha is 1.5; expected a number from 0 to 1"),
    ],
)
def test_wrong_numbers_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        replace(DISTILLED, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["swap", "streamed"])
def test_nag_gives_the_same_bits_wherever_the_weights_are_and_after_a_restart(tiny: TinyModels, plan: str) -> None:
    engine = resolve({"model_path": str(tiny.t2v)}, {"device": "cpu"}).engine
    with LightX2VPipeline.from_config(engine) as pipe:
        whole, shelf = latents(pipe, DISTILLED), Shelf()
        stop_after(pipe, DISTILLED, 2, shelf)
        result = go_on(pipe, DISTILLED, shelf)
        assert result.latents is not None and torch.equal(result.latents, whole) and result.resumed_after == 2
        other = go_on(pipe, replace(DISTILLED, nag_tau=2.0), shelf)
        assert other.resumed_after == 0 and any("nag_tau" in warning for warning in other.warnings)
        loaded = pipe._loaded()
        placement = Offloaded(
            loaded.placement, ladder=MemoryLadder(PLANS[plan]), device=CPU, copies=HostCopies(poison=True)
        )
        pipe._engine = replace(loaded, placement=placement)
        assert torch.equal(latents(pipe, DISTILLED), whole)
