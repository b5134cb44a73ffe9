"""Several prompts in one forward, and what is kept of a prompt between two."""

from __future__ import annotations

import pytest
import torch
from dit_reference import COND, LATENTS, TINY, UNCOND, draw, make, relative
from torch import Tensor

from lightx2v.attention.sdpa import sdpa
from lightx2v.models.dit import CHUNK, WanDiT

# --- several prompts -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stack_tokens", [0, 10_000])
@pytest.mark.parametrize("chunk", [CHUNK, 10])
@pytest.mark.parametrize("sequential_cfg", [False, True])
def test_prompts_together_equal_prompts_one_by_one(stack_tokens: int, chunk: int, sequential_cfg: bool) -> None:
    dit = make(stack_tokens=stack_tokens, chunk=chunk, sequential_cfg=sequential_cfg)
    with torch.no_grad():
        texts = [dit.encode_text(context) for context in (COND, UNCOND, draw(20, 24, seed=4))]
        together = dit(LATENTS, 800.0, texts)
        alone = [make()(LATENTS, 800.0, [text])[0] for text in texts]
    assert len(together) == 3
    for got, expected in zip(together, alone, strict=True):
        assert relative(got, expected) <= (0 if chunk == CHUNK and not stack_tokens else 1e-5)


@pytest.mark.parametrize(("stack_tokens", "calls"), [(0, 1 + 2 * 2), (10_000, 3)])
def test_each_block_is_visited_once_and_the_first_attends_to_itself_once(stack_tokens: int, calls: int) -> None:
    attended: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended.append(q.shape[0])
        return sdpa(q, k, v)

    dit = make(stack_tokens=stack_tokens, self_attention=counted)
    visits: list[int] = []
    for n, block in enumerate(dit.blocks):
        block.register_forward_pre_hook(lambda *_, n=n: visits.append(n))
    with torch.no_grad():
        dit(LATENTS, 800.0, [dit.encode_text(COND), dit.encode_text(UNCOND)])
    assert visits == [0, 1, 2]
    assert len(attended) == calls and attended[0] == 1


@pytest.mark.parametrize("chunk", [1, 7, 71, 72, 1000])
def test_a_chunk_changes_memory_not_the_result(chunk: int) -> None:
    dit = make()
    with torch.no_grad():
        texts = [dit.encode_text(COND), dit.encode_text(UNCOND)]
        whole = dit(LATENTS, 800.0, texts)
        dit.chunk = chunk
        pieces = dit(LATENTS, 800.0, texts)
    assert max(map(relative, pieces, whole)) <= 1e-5


def test_a_chunk_bounds_the_tokens_in_the_feed_forward() -> None:
    dit, seen = make(chunk=10), []
    dit.blocks[1].ffn[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        dit(LATENTS, 800.0, [dit.encode_text(COND)])
    assert seen == [10] * 7 + [2]


# --- text ------------------------------------------------------------------------------------------------------------


def count_keys(dit: WanDiT) -> list[int]:
    rows: list[int] = []
    for block in dit.blocks:
        block.cross_attn.k.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    return rows


def test_keys_and_values_of_a_prompt_are_computed_once() -> None:
    dit = make()
    rows = count_keys(dit)
    with torch.no_grad():
        kept, fresh = dit.encode_text(COND), dit.encode_text(COND, keep=False)
        first = dit(LATENTS, 800.0, [kept])[0]
        assert rows == [8, 8, 8]  # seven rows, and one for all the padding
        assert torch.equal(dit(LATENTS, 800.0, [kept])[0], first)
        assert rows == [8] * 3
        assert torch.equal(dit(LATENTS, 800.0, [fresh])[0], first)
        assert torch.equal(dit(LATENTS, 800.0, [fresh])[0], first)
        assert rows == [8] * 9


def test_encoding_again_after_a_change_of_weights_sees_the_change() -> None:
    dit = make()
    with torch.no_grad():
        before = dit(LATENTS, 800.0, [dit.encode_text(COND)])[0]
        dit.blocks[1].cross_attn.v.weight.add_(1.0)
        after = dit(LATENTS, 800.0, [dit.encode_text(COND)])[0]
        other = make()
        other.load_state_dict(dit.state_dict())
        assert torch.equal(after, other(LATENTS, 800.0, [other.encode_text(COND)])[0])
    assert relative(after, before) > 1e-3


def test_nothing_of_one_request_stays_for_the_next() -> None:
    dit = make()
    with torch.no_grad():
        alone = dit(LATENTS, 800.0, [dit.encode_text(COND)])[0]
        dit(draw(16, 2, 6, 4), 100.0, [dit.encode_text(UNCOND), dit.encode_text(COND)])
        assert torch.equal(dit(LATENTS, 800.0, [dit.encode_text(COND)])[0], alone)


@pytest.mark.parametrize("rows", [1, 7, 19, 20])
def test_padding_is_attended_to_by_kernels_without_a_mask_too(rows: int) -> None:
    lengths: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths.append(k.shape[1])
        return sdpa(q, k, v)

    context = draw(rows, 24)
    with torch.no_grad():
        dit, other = make(), make(cross_attention=kernel)
        expected = dit(LATENTS, 800.0, [dit.encode_text(context)])[0]
        got = other(LATENTS, 800.0, [other.encode_text(context)])[0]
    assert lengths == [TINY.text_len] * 3
    assert relative(got, expected) <= 1e-5


def test_inputs_are_left_as_they_were() -> None:
    dit, latents, context = make(), LATENTS.clone(), COND.clone()
    with torch.no_grad():
        text = dit.encode_text(context)
        rows = text.rows_BLD.clone()
        dit(latents, 800.0, [text, text])
    assert torch.equal(latents, LATENTS) and torch.equal(context, COND) and torch.equal(text.rows_BLD, rows)
