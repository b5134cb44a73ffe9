"""Forms: which keys of a LoRA's layer make a change together, and whether their shapes make one of a model's tensor."""

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from ..errors import LoraError

Shapes = Mapping[str, tuple[int, ...]]

Keys = dict[str, str]
"""One layer's keys in the file, by kind ("up", "down", "alpha", "diff", …)."""

Form = Literal["pair", "difference", "kronecker", "hadamard"]

MAGNITUDES = ("magnitude", "dora_scale")
"""The kinds of keys that make a DoRA of any other form."""

FACTORS: dict[Form, tuple[tuple[str, ...], ...]] = {
    "pair": (("up",), ("down",)),
    "kronecker": (
        ("lokr_w1", "lokr_w1_a"),
        ("lokr_w1", "lokr_w1_b"),
        ("lokr_w2", "lokr_w2_a"),
        ("lokr_w2", "lokr_w2_b"),
    ),
    "hadamard": tuple((f"hada_w{index}_{side}",) for index in (1, 2) for side in "ab"),
}
"""The kinds of keys that a form needs, with those that may stand instead."""
CORES = ("lokr_t2", "hada_t1", "hada_t2")
NAMES: dict[Form, str] = {"pair": "LoRA", "kronecker": "LoKr", "hadamard": "LoHa"}
RANKS: dict[Form, tuple[str, ...]] = {
    "pair": ("down",),
    "kronecker": ("lokr_w1_b", "lokr_w2_b"),
    "hadamard": ("hada_w1_b",),
}
"""The keys whose first size is the rank."""


def changes(keys: Keys, layer: str, source: str) -> Iterator[tuple[str, Form, Keys]]:
    """The changes of one layer: ("weight" | "bias" | "modulation", form, keys)."""
    forms: list[Form] = [
        form for form, needs in FACTORS.items() if any(kind in keys for kinds in needs for kind in kinds)
    ]
    if len(forms) + ("diff" in keys) > 1:
        raise LoraError(f"{source}: {layer:.100} changes in two ways ({', '.join(keys)}). It is mixed up.")
    for form in forms:
        absent = [kinds[-1] for kinds in FACTORS[form] if not any(kind in keys for kind in kinds)]
        if absent or ("hada_t1" in keys) != ("hada_t2" in keys):
            has = " and ".join(kind for kind in keys if kind != "alpha")
            said = f"has only its {has} half" if form == "pair" else f"is a {NAMES[form]} with {has} only"
            raise LoraError(f"{source}: {layer:.100} {said}. The file is incomplete: get it again.")
        used = {*(kind for kinds in FACTORS[form] for kind in kinds), *CORES, *MAGNITUDES}
        yield "weight", form, {kind: key for kind, key in keys.items() if kind in used}
    if not forms and not keys.keys().isdisjoint(MAGNITUDES):
        raise LoraError(f"{source}: {layer:.100} has only a DoRA's magnitude. The file is incomplete: get it again.")
    for kind, part in (("diff", "weight"), ("diff_b", "bias"), ("diff_m", "modulation"), ("up_bias", "bias")):
        if kind in keys:
            yield part, "difference", {kind: keys[kind]}


def rank_of(keys: Keys, form: Form, shapes: Shapes) -> int | None:
    """The rank of a layer with these keys; None for a LoKr without low-rank factors."""
    kinds = RANKS["pair" if form == "difference" else form]
    return next((shapes[keys[kind]][0] for kind in kinds if kind in keys), None)


def misfit(shapes: Mapping[str, tuple[int, ...]], form: Form, expected: tuple[int, ...]) -> tuple[str, int]:
    """Why tensors of these shapes, by kind, do not make a change of a tensor of shape `expected`, or "".

    And the input channels that they are for, where these are fewer than those of a patch embedding.
    """
    flat = (math.prod(expected[:1]), math.prod(expected[1:]))
    if form == "difference":
        (shape,) = shapes.values()
        got = (shape[0] if shape else 1, math.prod(shape[1:]))
        fits = math.prod(shape) == math.prod(expected) and (shape == expected or shape[:1] == expected[:1])
        said = f"has a difference of {list(shape)}, the model {list(expected)}"
    else:
        if zero := next((kind for kind in shapes if 0 in shapes[kind]), None):
            return f"has rank 0: {zero} is {list(shapes[zero])}", 0
        got = _product_shape(shapes, form)
        fits = got == flat and len(expected) >= 2
        if form == "pair":
            said = f"has up {list(shapes['up'])} and down {list(shapes['down'])}, the model {list(expected)}"
        else:
            listed = ", ".join(f"{kind} {list(shape)}" for kind, shape in shapes.items())
            said = f"has {listed}, the model {list(expected)}"
    magnitude: tuple[int, ...] | None = next((shapes[kind] for kind in MAGNITUDES if kind in shapes), None)
    if fits and magnitude is not None:
        rows = math.prod(magnitude) == flat[0] and ("magnitude" in shapes or magnitude[0] == flat[0])
        columns = "dora_scale" in shapes and magnitude[:2] == (1, *expected[1:2]) == (1, math.prod(magnitude))
        return ("" if rows or columns else f"has magnitudes {list(magnitude)}, the model {list(expected)}"), 0
    if fits:
        return "", 0
    kernel = math.prod(expected[2:])
    if len(expected) == 5 and got[0] == expected[0] and 0 < got[1] < flat[1] and got[1] % kernel == 0:
        return ("", got[1] // kernel) if magnitude is None and form in ("pair", "difference") else (said, 0)
    return said, 0


def _product_shape(shapes: Mapping[str, tuple[int, ...]], form: Form) -> tuple[int, int]:
    """(rows, columns) of the change that factors of these shapes make; (0, 0) where they do not fit each other."""
    flat = {kind: (shape[0], math.prod(shape[1:])) for kind, shape in shapes.items() if kind not in MAGNITUDES}
    if any(len(shapes[kind]) < 2 for kind in flat):
        return 0, 0

    def product(a: str, b: str, core: str = "") -> tuple[int, int]:
        if core in shapes:
            t, left, right = shapes[core], flat[a], flat[b]
            return (left[1], right[1] * math.prod(t[2:])) if t[:2] == (left[0], right[0]) else (0, 0)
        return (flat[a][0], flat[b][1]) if flat[a][1] == flat[b][0] else (0, 0)

    if form == "pair":
        return product("up", "down")
    if form == "hadamard":
        one, two = (product(f"hada_w{index}_a", f"hada_w{index}_b", f"hada_t{index}") for index in (1, 2))
        return one if one == two else (0, 0)
    one, two = (
        flat.get(name) or product(f"{name}_a", f"{name}_b", core)
        for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
    )
    return one[0] * two[0], one[1] * two[1]
