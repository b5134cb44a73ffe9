"""The dialects of LoRA files: which layer and which part a key names, and which tensor of the model that is.

Names may be Wan's, diffusers' or kohya's, in any wrappers. Besides low-rank pairs a file may hold LoKr's and LoHa's
factors, DoRA's magnitudes, and plain differences: `.diff` or `.w_norm` (weights), `.diff_b` or `.b_norm` (biases),
`.diff_m` (modulation). One file may hold both experts' halves, as diffusers saves them: `transformer.` is the
high-noise one, `transformer_2.` the low-noise one.
"""

import re
from collections.abc import Iterable
from typing import Literal

from .dit_names import diffusers_to_wan, wan_to_diffusers
from .wrapper_prefixes import unwrap_dit

_ADAPTER = r"(?:\.(?!(?:weight|bias)(?:$|_)|alpha$)\w+)?"
"""PEFT's name for an adapter, as in `lora_A.default.weight`."""
_PAIR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<a>up|down|mid)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<b>up|down)\.weight"
    rf"|\.lora_(?P<c>[AB])(?:{_ADAPTER}\.weight)?"
    rf"|\.lora_(?:B{_ADAPTER}|up)\.(?P<d>bias)"
    r")"
)
_FACTOR = re.compile(
    rf"(?P<stem>.+)\.(?P<kind>lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]){_ADAPTER}(?:\.weight)?"
)
_MAGNITUDE = re.compile(rf"(?P<stem>.+)\.(?P<kind>dora_scale|lora_magnitude_vector|magnitude){_ADAPTER}(?:\.weight)?")
_PLAIN = re.compile(
    r"(?P<stem>.+?)(?:(?:[._]lora(?:_linear_layer)?|\.lora_(?:A|B|up|down))?\.(?P<alpha>alpha)"
    r"|\.(?P<kind>diff|diff_b|diff_m|w_norm|b_norm))"
)
_KINDS = {"w_norm": "diff", "b_norm": "diff_b", "lora_magnitude_vector": "magnitude"}

_FOREIGN = {
    "OFT or BOFT": r"oft_(?:r|blocks|diag)",
    "GLoRA": r"[._][ab][12]\.weight$",
    "IA3": r"on_input|ia3_",
    "VeRA": r"vera_lambda",
    "full weights of a trainer": r"modules_to_save|set_weight",
}
"""Kinds of adapters that are not supported, by what only their keys hold."""
_HARMLESS = re.compile(
    r"(^|[._])(k_img|v_img|norm_k_img|img_emb|add_k_proj|add_v_proj|norm_added_[kq]|image_embedder)([._]|$)"
)
_FLAT_PREFIX = re.compile(
    r"_*(lora_unet|lora_transformer|lora_dit|lora|lycoris|base_model|diffusion_model|model|orig_mod"
    r"|transformer_2|transformer|unet|wan|dit_?2|dit|pipe|module|net|ema_model|ema|student|(?:high|low)_noise(?:_model)?)_+(?=[a-z])"
)
_LOW = re.compile(r"transformer_2|dit_?2|low_noise(?:_model)?")
_HIGH = re.compile(r"high_noise(?:_model)?")

Expert = Literal["high", "low"]


def parse_key(key: str) -> tuple[str, str] | None:
    """(layer, kind) of a file's key; None for an unknown one.

    Kinds: up, down, mid, up_bias, alpha, diff, diff_b, diff_m, dora_scale, magnitude, and lokr_… and hada_… as in the
    key.
    """
    if match := _PAIR.fullmatch(key):
        kind = match["a"] or match["b"] or {"A": "down", "B": "up", None: "up_bias"}[match["c"]]
    elif match := _FACTOR.fullmatch(key) or _MAGNITUDE.fullmatch(key) or _PLAIN.fullmatch(key):
        kind = _KINDS.get(match["kind"], match["kind"] or "alpha")
    else:
        return None
    return match["stem"].replace(".processor.", "."), kind


def foreign_kind(key: str) -> str | None:
    """The name of the kind of adapter that the key belongs to, if it is one that is not supported."""
    return next((name for name, pattern in _FOREIGN.items() if re.search(pattern, key)), None)


def is_harmless(name: str) -> bool:
    """Whether this is a layer for a CLIP image. Wan2.1 has these, Wan2.2 has not; distilled LoRAs carry them along."""
    return bool(_HARMLESS.search(name))


def experts_of(layers: Iterable[str]) -> dict[str, Expert]:
    """{layer: the expert that its name says}. Where `transformer_2.` is the low-noise one, the others are the high one.

    Empty where no name says any: `transformer.` alone is only a prefix.
    """
    prefixes = {layer: set(_flat(layer)[1]) for layer in layers}
    low = {layer for layer, parts in prefixes.items() if any(map(_LOW.fullmatch, parts))}
    high = {layer for layer, parts in prefixes.items() if any(map(_HIGH.fullmatch, parts))}
    if low and not high:
        high = prefixes.keys() - low
    return dict.fromkeys(high, "high") | dict.fromkeys(low, "low")  # type: ignore[return-value]


def _flat(layer: str) -> tuple[str, list[str]]:
    """The layer's name with underscores for dots and without prefixes, and these prefixes."""
    flat, prefixes = layer.replace(".", "_"), []
    while match := _FLAT_PREFIX.match(flat):
        prefixes.append(match[1])
        flat = flat[match.end() :]
    return flat, prefixes


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
        found = self._direct(unwrap_dit(layer), part)
        if found is None and (known := self._by_kohya.get(_flat(layer)[0])) is not None:
            found = self._direct(known, part)
        return found

    def holds(self, key: str) -> bool:
        """Whether a file's key is about a layer of the model, whatever it says of it."""
        parts = key.split(".")
        return any(self.find(".".join(parts[:count]), "weight") for count in range(1, len(parts)))

    def _direct(self, layer: str, part: str) -> str | None:
        for wan in (layer, diffusers_to_wan(layer)):
            if f"{wan}.{part}" in self._names:
                return f"{wan}.{part}"
            if wan in self._names:  # a bare parameter, such as modulation
                return wan
        return None
