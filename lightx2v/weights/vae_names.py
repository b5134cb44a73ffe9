"""The VAE's tensor names: Wan's, which the project uses, and those of diffusers' AutoencoderKLWan, in any wrappers."""

import re
from collections.abc import Iterable

from ..errors import CheckpointError
from .wrapper_prefixes import unwrap_vae

_OUTSIDE = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{f"{half}.conv_in": f"{half}.conv1" for half in ("encoder", "decoder")},
    **{f"{half}.norm_out": f"{half}.head.0" for half in ("encoder", "decoder")},
    **{f"{half}.conv_out": f"{half}.head.2" for half in ("encoder", "decoder")},
}
_MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_LEAF = re.compile(rf"(.+)\.({'|'.join(_RESIDUAL)})")


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Wan's name for every tensor name of a file. CheckpointError where two names become one."""
    bare = {name: unwrap_vae(name) for name in names}
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in bare.values()):
        per_stage = 1 + len(
            {
                name
                for name in bare.values()
                if re.fullmatch(r"decoder\.up_blocks\.0\.resnets\.\d+\.conv1\.weight", name)
            }
        )
        bare = {name: _wan_name(theirs, per_stage) for name, theirs in bare.items()}
    seen: dict[str, str] = {}
    for name, wan in bare.items():
        if wan in seen:
            raise CheckpointError(f"The file holds {wan} twice, as {seen[wan]} and as {name}. Keep one of them.")
        seen[wan] = name
    return bare


def _wan_name(name: str, per_stage: int) -> str:
    """`per_stage`: the layers of a stage of the decoder, its blocks and the one that enlarges. Wan numbers them on."""
    layer, _, part = name.rpartition(".")
    if layer in _OUTSIDE:
        return f"{_OUTSIDE[layer]}.{part}"
    if match := _LEAF.fullmatch(layer):
        layer = f"{match[1]}.{_RESIDUAL[match[2]]}"
    layer = layer.replace("encoder.down_blocks.", "encoder.downsamples.")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(\w+\.\d)\.(.+)", layer):
        layer = f"{match[1]}.{_MIDDLE.get(match[2], match[2])}.{match[3]}"
    elif match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.(.+)", layer):
        place = int(match[1]) * per_stage + (int(match[3]) if match[3] else per_stage - 1)
        layer = f"decoder.upsamples.{place}.{match[4]}"
    return f"{layer}.{part}"
