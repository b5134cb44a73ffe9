"""The DiT's tensor names: Wan's, which the project uses, and diffusers', in wrappers of any kind.

The names in a file decide which of these it uses, never the file's name. All functions are pure: names in, names out.
"""

import re
from collections.abc import Iterable

from .wrapper_prefixes import each_once, unwrap_dit

_OUTSIDE = (  # Wan, diffusers; outside the blocks
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)
_BLOCK = (  # Wan, diffusers; after "blocks.<i>."
    ("modulation", "scale_shift_table"),
    ("norm3", "norm2"),  # the affine norm before cross-attention; diffusers' norm3 has no parameters
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    *(
        (f"{wan}.{leaf}", f"{diffusers}.{other}")
        for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for leaf, other in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
)
_TO_WAN = ({diffusers: wan for wan, diffusers in _OUTSIDE}, {diffusers: wan for wan, diffusers in _BLOCK})
_TO_DIFFUSERS = (dict(_OUTSIDE), dict(_BLOCK))
_IN_BLOCK = re.compile(r"blocks\.([0-9]+)\.(.+)")
_DIFFUSERS_ONLY = re.compile(
    r"condition_embedder\.|proj_out\.|scale_shift_table$|blocks\.[0-9]+\.(attn[12]\.|ffn\.net\.)"
)


def diffusers_to_wan(name: str) -> str:
    """Wan's name for a diffusers DiT name (no prefix); an unknown name is returned unchanged."""
    return _rename(name, *_TO_WAN)


def wan_to_diffusers(name: str) -> str:
    """The inverse of `diffusers_to_wan`."""
    return _rename(name, *_TO_DIFFUSERS)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these names (no prefix) are diffusers'. One name may not tell: both use `norm2` and `ffn`."""
    return any(_DIFFUSERS_ONLY.match(name) for name in names)


def wan_names(names: Iterable[str], source: str = "The file") -> dict[str, str]:
    """Wan's name for every DiT tensor name of the file `source`. CheckpointError where two names become one."""
    stripped = {name: unwrap_dit(name) for name in names}
    if is_diffusers(stripped.values()):
        stripped = {name: diffusers_to_wan(bare) for name, bare in stripped.items()}
    return each_once(stripped, source)


def _rename(name: str, outside: dict[str, str], block: dict[str, str]) -> str:
    inside = _IN_BLOCK.fullmatch(name)
    head, stem = (f"blocks.{inside[1]}.", inside[2]) if inside else ("", name)
    table = block if inside else outside
    # The longest known stem wins; the rest (".weight", ".weight_scale", ".lora_A.weight") stays.
    parts = stem.split(".")
    for count in range(len(parts), 0, -1):
        known = table.get(".".join(parts[:count]))
        if known is not None:
            return head + ".".join([known, *parts[count:]])
    return name
