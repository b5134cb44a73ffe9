"""The DiT: equal to diffusers, of the official names and sizes, exact where it must be."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from dit_reference import COND, LATENTS, TINY, UNCOND, draw, make, pad, relative
from torch import Tensor

from benchmarks.diffusers_twin import diffusers_twin
from lightx2v.attention.sdpa import sdpa
from lightx2v.errors import Cancelled, CheckpointError
from lightx2v.models import block as block_module
from lightx2v.models.dit import CHUNK, DiTConfig, WanDiT, parameter_dtype
from lightx2v.progress import CancelToken

# --- the same as diffusers -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("timestep", [999.0, 937.5, 833.3333, 235.0, 0.0])
@pytest.mark.parametrize("rows", [1, 7, 19, 20])
def test_velocity_equals_diffusers(timestep: float, rows: int) -> None:
    dit, context = make(), draw(rows, 24)
    with torch.no_grad():
        (got,) = dit(LATENTS, timestep, [dit.encode_text(context)])
        expected = diffusers_twin(dit)(LATENTS[None], torch.tensor([timestep]), pad(context)[None]).sample[0]
    assert got.dtype == torch.float32 and got.shape == (16, 3, 8, 12)
    assert relative(got, expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "heads"), [(48, 4), (40, 2), (64, 1), (128, 1)])
@pytest.mark.parametrize("size", [(1, 2, 2), (2, 6, 4), (5, 2, 10)])
def test_any_width_heads_and_size_equal_diffusers(dim: int, heads: int, size: tuple[int, int, int]) -> None:
    config = DiTConfig(dim=dim, ffn_dim=60, freq_dim=32, text_dim=24, text_len=20, num_heads=heads, num_layers=2)
    dit, latents = make(config), draw(16, *size)
    with torch.no_grad():
        (got,) = dit(latents, 500.0, [dit.encode_text(COND)])
        expected = diffusers_twin(dit)(latents[None], torch.tensor([500.0]), pad(COND)[None]).sample[0]
    assert relative(got, expected) <= 1e-5


def test_a_condition_joins_the_latents_after_them() -> None:
    config = DiTConfig(in_dim=36, dim=48, ffn_dim=80, freq_dim=32, text_dim=24, text_len=20, num_heads=2, num_layers=2)
    dit, condition = make(config), draw(20, 3, 8, 12, seed=9)
    with torch.no_grad():
        (got,) = dit(LATENTS, 700.0, [dit.encode_text(COND)], condition)
        joined = torch.cat([LATENTS, condition])[None]
        expected = diffusers_twin(dit)(joined, torch.tensor([700.0]), pad(COND)[None]).sample[0]
    assert got.shape == LATENTS.shape and relative(got, expected) <= 1e-5


@pytest.mark.slow
def test_one_block_of_full_width_equals_diffusers() -> None:
    with torch.device("meta"):
        dit = WanDiT(DiTConfig(num_layers=1))
    noise = draw(99_991) * 0.02  # a prime length, so that no two rows repeat
    for name, parameter in list(dit.named_parameters()):
        count = parameter.numel()
        values = noise.repeat(-(-count // noise.numel()))[:count].view(parameter.shape)
        owner, _, leaf = name.rpartition(".")
        is_norm = "norm" in owner and leaf == "weight"
        setattr(dit.get_submodule(owner), leaf, torch.nn.Parameter(1 + values if is_norm else values, False))
    latents, context = draw(16, 2, 4, 6), draw(5, 4096)
    with torch.no_grad():
        (got,) = dit(latents, 937.5, [dit.encode_text(context)])
        expected = diffusers_twin(dit)(latents[None], torch.tensor([937.5]), pad(context, 512)[None]).sample[0]
    assert relative(got, expected) <= 1e-5


# --- names, sizes, dtypes --------------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_official_checkpoints() -> None:
    with torch.device("meta"):
        dit = WanDiT(DiTConfig(in_dim=36))
    shapes = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    attention = {f"{p}.weight": (5120, 5120) for p in "qkvo"} | {f"{p}.bias": (5120,) for p in "qkvo"}
    attention |= {"norm_q.weight": (5120,), "norm_k.weight": (5120,)}
    expected: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (5120, 36, 1, 2, 2),
        "patch_embedding.bias": (5120,),
        "text_embedding.0.weight": (5120, 4096),
        "text_embedding.0.bias": (5120,),
        "text_embedding.2.weight": (5120, 5120),
        "text_embedding.2.bias": (5120,),
        "time_embedding.0.weight": (5120, 256),
        "time_embedding.0.bias": (5120,),
        "time_embedding.2.weight": (5120, 5120),
        "time_embedding.2.bias": (5120,),
        "time_projection.1.weight": (30720, 5120),
        "time_projection.1.bias": (30720,),
        "head.head.weight": (64, 5120),
        "head.head.bias": (64,),
        "head.modulation": (1, 2, 5120),
    }
    for i in range(40):
        expected[f"blocks.{i}.modulation"] = (1, 6, 5120)
        for kind in ("self_attn", "cross_attn"):
            expected |= {f"blocks.{i}.{kind}.{leaf}": shape for leaf, shape in attention.items()}
        expected |= {f"blocks.{i}.norm3.weight": (5120,), f"blocks.{i}.norm3.bias": (5120,)}
        expected |= {f"blocks.{i}.ffn.0.weight": (13824, 5120), f"blocks.{i}.ffn.0.bias": (13824,)}
        expected |= {f"blocks.{i}.ffn.2.weight": (5120, 13824), f"blocks.{i}.ffn.2.bias": (5120,)}
    assert shapes == expected and len(shapes) == 1095
    assert sum(parameter.numel() for parameter in dit.parameters()) == 14_288_901_184


def test_what_touches_the_residual_stream_stays_float32() -> None:
    dit = make().cast(torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in dit.named_parameters()}
    assert dit.compute_dtype == torch.bfloat16
    assert all(dtype == parameter_dtype(name, torch.bfloat16) for name, dtype in dtypes.items())
    low = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    products = [f"{a}.{p}" for a in ("self_attn", "cross_attn") for p in "qkvo"] + ["ffn.0", "ffn.2"]
    layers = [f"blocks.{i}.{p}" for i in range(3) for p in products] + ["text_embedding.0", "text_embedding.2"]
    assert low == {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}


def shapes_of(dit: WanDiT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}


def test_the_architecture_comes_from_the_shapes() -> None:
    assert DiTConfig.from_checkpoint({"num_heads": 2, "text_len": 20}, shapes_of(make())) == TINY
    with torch.device("meta"):
        full = shapes_of(WanDiT(DiTConfig(in_dim=36)))
    assert DiTConfig.from_checkpoint(None, full) == DiTConfig(in_dim=36)  # heads of 128, as in every released model


def test_diffusers_words_for_the_architecture_are_understood() -> None:
    twin = diffusers_twin(make())
    config = DiTConfig.from_checkpoint({**dict(twin.config), "text_len": 20}, shapes_of(make()))
    assert config == TINY


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 2, "dim": 5120}, "dim is 5120, the tensors say 48"),
        ({"num_heads": 2, "in_channels": 36}, "in_dim is 36, the tensors say 16"),
        ({"num_heads": 2, "num_layers": 40}, "num_layers is 40, the tensors say 3"),
        ({"num_heads": 5}, "48 cannot be split into 5 heads"),
        ({"num_heads": 16}, "heads of even size"),
        ({}, "width of 48 does not show the number of heads"),
    ],
)
def test_a_config_of_another_model_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DiTConfig.from_checkpoint(config, shapes_of(make()))


@pytest.mark.parametrize("shapes", [{}, {"conv1.weight": (3, 3)}, {"patch_embedding.weight": (48,)}])
def test_tensors_of_something_else_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CheckpointError, match="not the weights of a Wan video model"):
        DiTConfig.from_checkpoint(None, shapes)


# --- precision, time, cancelling -------------------------------------------------------------------------------------


def test_bf16_is_closer_to_float32_than_with_a_bf16_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DiTConfig(dim=96, ffn_dim=192, freq_dim=32, text_dim=24, text_len=20, num_heads=4, num_layers=8)
    exact, ours = make(config), make(config).cast(torch.bfloat16)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.bfloat16().float()

    def run(dit: WanDiT) -> Tensor:
        with torch.no_grad():
            return dit(LATENTS, 900.0, [dit.encode_text(COND)])[0]

    expected, got = run(exact), run(ours)
    norm_modulate = block_module.norm_modulate
    monkeypatch.setattr(block_module, "add", lambda x, y: rounded(x + y))
    monkeypatch.setattr(block_module, "add_gated", lambda x, y, gate: rounded(x + y * rounded(gate.unsqueeze(1))))
    monkeypatch.setattr(
        block_module,
        "norm_modulate",
        lambda x, shift, scale, *rest: norm_modulate(x, rounded(shift), rounded(scale), *rest),
    )
    lower = run(ours)
    assert relative(got, expected) <= 2e-2
    assert relative(got, expected) < 0.8 * relative(lower, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocity_is_float32_in_every_compute_dtype(dtype: torch.dtype) -> None:
    dit = make().cast(dtype)
    seen: set[torch.dtype] = set()

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.update((q.dtype, k.dtype, v.dtype))
        return sdpa(q, k, v)

    dit.self_attention = dit.cross_attention = spy
    for chunk in (CHUNK, 10):
        dit.chunk = chunk
        with torch.no_grad():
            (velocity,) = dit(LATENTS, 900.0, [dit.encode_text(COND)])
        assert velocity.dtype == torch.float32 and velocity.isfinite().all()
    assert seen == {dtype}


def test_time_is_embedded_for_one_token() -> None:
    dit, shapes = make(), []
    for layer in (dit.time_embedding[0], dit.time_projection[1]):
        layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        dit(LATENTS, 900.0, [dit.encode_text(COND), dit.encode_text(UNCOND)])
    assert shapes == [(1, 32), (1, 48)]


def test_cancel_stops_between_blocks() -> None:
    dit, token, visits = make(), CancelToken(), []
    dit.blocks[1].register_forward_hook(lambda *_: token.cancel())
    dit.blocks[2].register_forward_pre_hook(lambda *_: visits.append(2))
    with torch.no_grad(), pytest.raises(Cancelled):
        dit(LATENTS, 900.0, [dit.encode_text(COND)], cancel=token)
    assert not visits


def test_attention_may_be_wrapped_after_construction() -> None:
    dit = make()
    with torch.no_grad():
        text = dit.encode_text(COND)
        expected = dit(LATENTS, 900.0, [text])[0]
        inner = dit.self_attention
        dit.self_attention = (
            lambda q, k, v: torch.cat(  # one head after the other, as on another rank
                [inner(q[:, :, n : n + 1], k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(q.shape[2])], dim=2
            )
        )
        assert relative(dit(LATENTS, 900.0, [text])[0], expected) <= 1e-6


def test_tokens_may_be_cut_and_joined_from_outside() -> None:
    """What sequence parallelism does around `embed` and `finish`, here with the ranks as one batch of tokens."""
    dit = make()
    with torch.no_grad():
        text = dit.encode_text(COND)
        expected = dit(LATENTS, 900.0, [text])[0]
        embed, finish, order = dit.embed, dit.finish, torch.arange(72).roll(31)

        def cut(*args: Any) -> tuple[Tensor, Tensor]:
            x_BLD, rotations = embed(*args)
            return x_BLD[:, order], rotations[order]

        dit.embed = cut
        dit.finish = lambda x_BLD, *args: finish(x_BLD[:, order.argsort()], *args)
        assert relative(dit(LATENTS, 900.0, [text])[0], expected) <= 1e-5


def test_two_threads_may_use_one_model() -> None:
    dit = make()
    with torch.no_grad():
        expected = [dit(draw(16, n, 4, 4), 500.0, [dit.encode_text(COND)])[0] for n in (1, 2)]
    results: dict[int, Tensor] = {}

    def work(n: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[n] = dit(draw(16, n, 4, 4), 500.0, [dit.encode_text(COND)])[0]

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[n], expected[n - 1]) for n in (1, 2))
