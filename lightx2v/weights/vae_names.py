"""The VAE's tensor names: Wan's, which the project uses, and those of diffusers' AutoencoderKLWan, in any wrappers."""

import re
from collections.abc import Iterable

from ..errors import CheckpointError
from .wrapper_prefixes import each_once, unwrap_vae

_OUTSIDE = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{f"{half}.conv_in": f"{half}.conv1" for half in ("encoder", "decoder")},
    **{f"{half}.norm_out": f"{half}.head.0" for half in ("encoder", "decoder")},
    **{f"{half}.conv_out": f"{half}.head.2" for half in ("encoder", "decoder")},
}
_DIFFUSERS = (
    *(f"{half}.{part}." for half in ("encoder", "decoder") for part in ("conv_in", "mid_block", "conv_out")),
    *("encoder.down_blocks.", "decoder.up_blocks.", "quant_conv.", "post_quant_conv."),
)
"""The parts of diffusers' AutoencoderKLWan that are called otherwise in Wan's file."""
_MIDDLE = {"resnets.0": "middle.0", "attentions.0": "middle.1", "resnets.1": "middle.2"}
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_LEAF = re.compile(rf"(.+)\.({'|'.join(_RESIDUAL)})")


def vae_names(names: Iterable[str], source: str = "The file") -> dict[str, str]:
    """Wan's name for every tensor name of the file `source`. CheckpointError where two names become one, and where one
    with diffusers' names lacks a part."""
    bare = {name: unwrap_vae(name) for name in names}
    if any(name.startswith(_DIFFUSERS) for name in bare.values()):
        missing = [f"{part}*" for part in _DIFFUSERS if not any(name.startswith(part) for name in bare.values())]
        if missing:
            raise CheckpointError(
                f"{source} is no whole AutoencoderKLWan of diffusers: it lacks {', '.join(missing)}. "
                "Download it again, or use Wan2.1_VAE.pth of the Wan-AI repository."
            )
        per_stage = 1 + len(
            {
                name
                for name in bare.values()
                if re.fullmatch(r"decoder\.up_blocks\.0\.resnets\.[0-9]+\.conv1\.weight", name)
            }
        )
        bare = {name: _wan_name(theirs, per_stage) for name, theirs in bare.items()}
    return each_once(bare, source)


def _wan_name(name: str, per_stage: int) -> str:
    """`per_stage`: the layers of a stage of the decoder, its blocks and the one that enlarges. Wan numbers them on."""
    layer, _, part = name.rpartition(".")
    if layer in _OUTSIDE:
        return f"{_OUTSIDE[layer]}.{part}"
    if match := _LEAF.fullmatch(layer):
        layer = f"{match[1]}.{_RESIDUAL[match[2]]}"
    layer = layer.replace("encoder.down_blocks.", "encoder.downsamples.")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(\w+\.[0-9])\.(.+)", layer):
        layer = f"{match[1]}.{_MIDDLE.get(match[2], match[2])}.{match[3]}"
    elif match := re.fullmatch(r"decoder\.up_blocks\.([0-9]+)\.(resnets\.([0-9]+)|upsamplers\.0)\.(.+)", layer):
        place = int(match[1]) * per_stage + (int(match[3]) if match[3] else per_stage - 1)
        layer = f"decoder.upsamples.{place}.{match[4]}"
    return f"{layer}.{part}"
