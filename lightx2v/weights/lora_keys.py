"""The dialects of LoRA files: which layer and which half a key names, and which tensor of the model that is.

Names may be Wan's, diffusers' or kohya's, with any of the known prefixes. Besides low-rank pairs a file may hold plain
differences: `.diff` (weights), `.diff_b` (biases), `.diff_m` (modulation).
"""

import re
from collections.abc import Iterable

from .dit_names import diffusers_to_wan, wan_to_diffusers

_PREFIX = re.compile(r"(base_model\.model\.|model\.|diffusion_model\.|transformer(_2)?\.|unet\.|dit\.)")
_KOHYA = re.compile(r"(lora_unet|lora_transformer|lora_dit|lora|lycoris)_+(?=\w)")
_PAIR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<a>up|down|mid)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<b>up|down)\.weight"
    r"|\.lora_(?P<c>[AB])(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?"
    r")"
)
_PLAIN = re.compile(r"(?P<stem>.+)\.(?P<kind>alpha|diff|diff_b|diff_m)")
_FOREIGN = re.compile(r"dora_scale|magnitude_vector|lokr_|hada_|oft_|boft_|lora_B\.bias")
_HARMLESS = re.compile(
    r"(^|[._])(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_[kq]|image_embedder)([._]|$)"
)


def parse_key(key: str) -> tuple[str, str] | None:
    """(layer, kind) of a file's key; None for an unknown one. Kinds: up, down, mid, alpha, diff, diff_b, diff_m."""
    if match := _PAIR.fullmatch(key):
        kind = match["a"] or match["b"] or {"A": "down", "B": "up"}[match["c"]]
    elif match := _PLAIN.fullmatch(key):
        kind = match["kind"]
    else:
        return None
    return match["stem"].replace(".processor.", "."), kind


def is_foreign(key: str) -> bool:
    """Whether the key belongs to DoRA, LoKr, LoHa or OFT."""
    return bool(_FOREIGN.search(key))


def is_harmless(name: str) -> bool:
    """Whether this is a layer for a CLIP image. Wan2.1 has these, Wan2.2 has not; distilled LoRAs carry them along."""
    return bool(_HARMLESS.search(name))


class LayerFinder:
    """Finds the model's tensor for a LoRA's layer, in any dialect."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._by_kohya: dict[str, str] = {}
        for name in names:
            stem = name.rpartition(".")[0]
            for spelling in (stem, wan_to_diffusers(stem), name, wan_to_diffusers(name)):
                self._by_kohya.setdefault(spelling.replace(".", "_"), stem)

    def find(self, layer: str, part: str) -> str | None:
        """The name of that layer's `part`: "weight", "bias" or "modulation"."""
        while (match := _PREFIX.match(layer)) and not self._direct(layer, part):
            layer = layer[match.end() :]
        found = self._direct(layer, part)
        if found is None and (match := _KOHYA.match(layer)):
            known = self._by_kohya.get(layer[match.end() :])
            found = self._direct(known, part) if known else None
        return found

    def _direct(self, layer: str, part: str) -> str | None:
        for wan in (layer, diffusers_to_wan(layer)):
            if f"{wan}.{part}" in self._names:
                return f"{wan}.{part}"
            if wan in self._names:  # a bare parameter, such as modulation
                return wan
        return None
