"""Names of other programs become Wan's, and back."""

from __future__ import annotations

import pytest
from tiny import DiTSizes, random_dit

from lightx2v.errors import CheckpointError
from lightx2v.weights.dit_names import diffusers_to_wan, is_diffusers, wan_names, wan_to_diffusers

NAMES = tuple(random_dit(DiTSizes(num_layers=3), 16, 32, seed=0))


def test_diffusers_names_are_those_of_diffusers() -> None:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        qk_norm="rms_norm_across_heads",
    )
    assert {wan_to_diffusers(name) for name in NAMES} == set(model.state_dict())


def test_every_name_survives_the_way_there_and_back() -> None:
    assert [diffusers_to_wan(wan_to_diffusers(name)) for name in NAMES] == list(NAMES)


PREFIXES = (
    *("", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "_orig_mod.", "module.", "net."),
    *("dit.", "pipe.dit.", "_fsdp_wrapped_module.", "module._orig_mod.", "pipe.dit._orig_mod.", "transformer_2."),
    "ema_model.",
    "generator_ema.model.",
    "student.",
    "module._fsdp_wrapped_module.model.diffusion_model._orig_mod.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("theirs", [False, True])
def test_a_file_of_any_dialect_gets_wans_names(prefix: str, theirs: bool) -> None:
    written = {prefix + (wan_to_diffusers(name) if theirs else name): name for name in NAMES}
    assert wan_names(written) == written


def test_what_follows_a_known_name_stays() -> None:
    assert diffusers_to_wan("blocks.7.attn1.to_out.0.weight_scale") == "blocks.7.self_attn.o.weight_scale"
    assert diffusers_to_wan("blocks.7.ffn.net.0.proj.lora_A.weight") == "blocks.7.ffn.0.lora_A.weight"
    assert (
        diffusers_to_wan("condition_embedder.image_embedder.ff.weight") == "condition_embedder.image_embedder.ff.weight"
    )


def test_both_meanings_of_norm2_are_kept_apart() -> None:
    """diffusers' `norm2` is Wan's `norm3`; in a file with Wan's names nothing of the kind may happen."""
    assert wan_names(["blocks.0.norm3.weight", "blocks.0.self_attn.q.weight"])["blocks.0.norm3.weight"].endswith(
        "norm3.weight"
    )
    assert wan_names(["blocks.0.norm2.weight", "blocks.0.attn1.to_q.weight"])["blocks.0.norm2.weight"].endswith(
        "norm3.weight"
    )
    assert not is_diffusers(NAMES)


def test_wrappers_between_a_names_parts_are_looked_through() -> None:
    inside = "model._fsdp_wrapped_module.blocks.3._checkpoint_wrapped_module.self_attn._orig_mod.q.weight"
    assert wan_names([inside]) == {inside: "blocks.3.self_attn.q.weight"}
    assert wan_names(["modelling.x", "networks.y"]) == {"modelling.x": "modelling.x", "networks.y": "networks.y"}


def test_two_names_for_one_tensor_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"head\.head\.weight twice"):
        wan_names(["head.head.weight", "diffusion_model.head.head.weight"])
