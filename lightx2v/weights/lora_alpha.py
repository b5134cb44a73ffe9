"""LoraScales: alpha / rank of a LoRA's layers, from wherever the file's trainer has written alpha.

    scales = LoraScales(checkpoint)
    scales.of(layer, rank)          for a layer without an `.alpha` tensor of its own, which would count

Alpha is in the safetensors header (diffusers' `lora_adapter_metadata`, or the words of PEFT, kohya and others), else in
PEFT's `adapter_config.json` beside the file. Nowhere means alpha = rank. What contradicts itself or the tensors' ranks,
or changes the meaning of the tensors in a way that is not known here, is refused: a wrong scale shows only in a video.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoraError, one_line, quoted, short_path
from .checkpoint import Checkpoint

ALPHA = frozenset("lora_alpha ss_network_alpha network_alpha alpha".split())
RANK = frozenset("r rank lora_rank lora_r ss_network_dim network_dim lora_dim network_rank".split())
PATTERNS = frozenset({"alpha_pattern", "rank_pattern"})
JSON_WORDS = frozenset("lora_adapter_metadata lora_config peft_config adapter_config".split())
"""Header entries that are JSON objects of such words."""
CONFIG = "adapter_config.json"

_PEFT_TYPES = ("LORA", "LOKR", "LOHA")
_OTHER_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "loraga")
"""PEFT's ways to begin that change the base model's weights: the file fits only those."""
_OWN_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "kaiming", "xavier", "normal", "default")
"""Ways to begin that leave it as it is."""
_OTHER_MATH = ("use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "arrow_config")
_COMPONENT = {"high": "transformer", "low": "transformer_2"}
MAX_CONFIG, MAX_PATTERNS, MAX_PATTERN = 4 << 20, 2000, 200


@dataclass(slots=True)
class AdapterWords:
    """What one source says of one component of a pipeline, such as `transformer`."""

    alphas: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, float] = field(default_factory=dict)
    alpha_pattern: dict[re.Pattern[str], float] = field(default_factory=dict)
    rank_pattern: dict[re.Pattern[str], float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    peft_type: str = "LORA"


class LoraScales:
    """`expert` chooses between the two halves of a header; `source` is the file's name for messages."""

    def __init__(self, checkpoint: Checkpoint, source: str, expert: str | None = None) -> None:
        self._source, self._expert = source, expert
        self._checkpoint = checkpoint
        self._words: AdapterWords | None = None
        self._where = ""
        self.used: dict[str, int] = {}
        """{sentence about alpha: the number of layers that it is true of}, for the report."""

    def of(self, layer: str, rank: int | None) -> float:
        """alpha / rank of a layer; a LoKr without low-rank factors has a `rank` of None. LoraError if it is unclear."""
        words = self._read()
        if words is None:
            self._count("without an alpha: taken as its rank")
            return 1.0
        named_rank = _one(words.rank_pattern, layer, words.ranks, f"{self._where} ranks", self._source)
        alpha = _one(words.alpha_pattern, layer, words.alphas, f"{self._where} alphas", self._source)
        if rank is None and words.peft_type == "LORA":
            return 1.0
        if rank is None:  # PEFT divides by the configured rank all the same
            rank = int(named_rank or 0)
        elif named_rank is not None and named_rank != rank:
            raise LoraError(
                f"{self._source}: by {self._where} the rank of {layer:.100} is {named_rank:g}, its tensors have {rank}."
                f" The two belong to different files: put {self._where} right, or remove it."
            )
        if not alpha or not rank:
            self._count("without an alpha: taken as its rank")
            return 1.0
        scale = alpha / (rank**0.5 if words.rslora else rank)
        root = "the root of " if words.rslora else ""
        self._count(f"with alpha {alpha:g} from {self._where}: {root}rank {rank}, scale {scale:g}")
        return scale

    @property
    def says_dora(self) -> bool:
        """Whether the source that `of` has read says that the file is a DoRA."""
        return self._words is not None and self._words.dora

    def _count(self, sentence: str) -> None:
        self.used[sentence] = self.used.get(sentence, 0) + 1

    def _read(self) -> AdapterWords | None:
        if not self._where:
            self._where = "its header"
            self._words = self._component(_header(self._checkpoint.metadata, self._source))
            if self._words is None or not self._words.alphas and not self._words.alpha_pattern:
                beside = _beside(self._checkpoint.path, self._source)
                if beside is not None:
                    self._where = f"the {CONFIG} beside it"
                    self._words = self._component(beside)
        return self._words

    def _component(self, entries: Iterable[tuple[str, str, Any]]) -> AdapterWords | None:
        """The words of this expert's component. Those without a component count for all."""
        by_component: dict[str, AdapterWords] = {}
        for component, word, value in entries:
            _add(by_component.setdefault(component, AdapterWords()), word, value, f"{self._source}: {self._where}")
        wanted = _COMPONENT.get(self._expert or "", "")
        names = [name for name in by_component if name and not name.startswith("text_encoder")]
        if not wanted or wanted not in by_component:
            wanted = names[0] if names else ""
            if any(by_component[name] != by_component[wanted] for name in names):
                raise LoraError(
                    f"{self._source}: {self._where} has values for {', '.join(names)[:200]}, and nothing says which of "
                    "them these tensors are. Set the LoRA for the high-noise or the low-noise expert."
                )
        found, common = by_component.get(wanted), by_component.get("")
        if found is None or common is None or found is common:
            return found or common
        found.alphas |= {f"{name} ": value for name, value in common.alphas.items()}
        found.ranks |= {f"{name} ": value for name, value in common.ranks.items()}
        found.rslora, found.dora = found.rslora or common.rslora, found.dora or common.dora
        return found


def _header(metadata: Mapping[str, Any], source: str) -> Iterable[tuple[str, str, Any]]:
    """(component, word, value) of everything in a header that may be about alpha and rank."""
    for key, value in sorted(metadata.items()):  # safetensors writes them in an order of its own
        component, _, word = key.rpartition(".")
        word = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", word).lower()  # networkAlpha, LoRA_alpha
        if word in JSON_WORDS:
            yield from _entries(_json(value, f"{source}: {key:.60} in its header"))
        elif word in ALPHA | RANK | PATTERNS | _FLAGS.keys():
            yield component, word, value


def _entries(words: Mapping[str, Any]) -> Iterable[tuple[str, str, Any]]:
    for key, value in words.items():
        component, _, word = key.rpartition(".")
        yield component, word, value


def _beside(path: Path, source: str) -> list[tuple[str, str, Any]] | None:
    """PEFT's configuration of this file. It belongs to `adapter_model.safetensors` where there is one."""
    folder = path if path.is_dir() else path.parent
    config = folder / CONFIG
    others = [name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).is_file()]
    if not config.is_file() or (others and not path.is_dir() and path.name not in others):
        return None
    try:
        if config.stat().st_size > MAX_CONFIG:
            raise ValueError(f"it has more than {MAX_CONFIG} bytes")
        text = config.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise LoraError(f"{short_path(config)} cannot be read ({error!s:.100}). Get it again, or remove it.") from None
    words = _json(text, f"{source}: {CONFIG} beside it")
    if str(words.get("peft_type", "LORA")).upper() in ("LOKR", "LOHA") and "alpha" in words:
        words["lora_alpha"] = words.pop("alpha")
    return list(_entries(words))


def _json(text: Any, what: str) -> dict[str, Any]:
    try:
        words = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, dict):
        raise LoraError(
            f"{what} is no JSON object, so the LoRA's scale is not known. Get the file again, or remove it."
        )
    return words


def _add(words: AdapterWords, word: str, value: Any, what: str) -> None:
    """One word of a source. LoraError where its value is none, or says that the tensors mean something else."""
    if word in RANK and str(value).lower() == "dynamic":  # the tensors tell each layer's
        return
    if word in ALPHA or word in RANK:
        number = _number(value, f"{what} has {word}")
        if number is not None:
            (words.alphas if word in ALPHA else words.ranks)[word] = number
    elif word in PATTERNS:
        patterns = _json(value, f"{what} has {word}, which") if value else {}
        if len(patterns) > MAX_PATTERNS:
            raise LoraError(f"{what} has {len(patterns)} patterns; at most {MAX_PATTERNS} are read.")
        for key, given in patterns.items():
            if (number := _number(given, f"{what} has {word}")) is not None:
                getattr(words, word)[_pattern(key, what)] = number
    elif word in _FLAGS:
        _FLAGS[word](words, word, value, what)
    elif word.startswith("use_"):  # of a newer PEFT: it may change what the tensors mean
        _math(words, word, value, what)


def _rslora(words: AdapterWords, word: str, value: Any, what: str) -> None:
    words.rslora = words.rslora or _true(value)


def _dora(words: AdapterWords, word: str, value: Any, what: str) -> None:
    words.dora = words.dora or _true(value)


def _peft_type(words: AdapterWords, word: str, value: Any, what: str) -> None:
    words.peft_type = str(value or "LORA").rpartition(".")[2].upper()
    if words.peft_type not in _PEFT_TYPES:
        raise LoraError(f"{what} has peft_type {quoted(value)}; {', '.join(_PEFT_TYPES)} are supported.")


def _init(words: AdapterWords, word: str, value: Any, what: str) -> None:
    begun = str(value).lower().replace("-", "_")
    if begun.startswith(_OTHER_BASE):
        raise LoraError(
            f"{what} has {word} {quoted(value)}: the base model was changed before the training, so this LoRA does not "
            "fit the released one. Convert it with PEFT's path_initial_model_for_weight_conversion."
        )
    if begun not in _OWN_BASE:
        raise LoraError(f"{what} has {word} {quoted(value)}, which is not known here. It may need another base model.")


def _math(words: AdapterWords, word: str, value: Any, what: str) -> None:
    if value not in (None, False, "", [], {}) and str(value).lower() not in ("none", "null", "false", "[]", "{}"):
        raise LoraError(f"{what} has {word} {quoted(value)}, which is not supported.")


_FLAGS = {
    **dict.fromkeys(("use_rslora", "rslora", "rs_lora"), _rslora),
    **dict.fromkeys(("use_dora",), _dora),
    **dict.fromkeys(_OTHER_MATH, _math),
    "peft_type": _peft_type,
    "init_lora_weights": _init,
}


def _true(value: Any) -> bool:
    return value is True or str(value).lower() in ("true", "1")


def _number(value: Any, what: str) -> float | None:
    """A finite number that is not negative; None where a trainer wrote that there is none."""
    if value is None or str(value).strip().lower() in ("", "none", "null"):
        return None
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise LoraError(f"{what} {one_line(quoted(value))}, expected a number. The scale of the LoRA is not known.")
    return number


def _pattern(key: str, what: str) -> re.Pattern[str]:
    """PEFT takes these keys as regular expressions. Those that could take for ever are refused."""
    if len(key) > MAX_PATTERN or key.count("*") + key.count("+") > 3 or re.search(r"[()?{}]", key):
        raise LoraError(f"{what} has the pattern {quoted(key)}, which is not supported; expected the name of a layer.")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error:
        raise LoraError(f"{what} has the pattern {quoted(key)}, which is no regular expression.") from None


def _one(
    patterns: Mapping[re.Pattern[str], float], layer: str, values: Mapping[str, float], what: str, source: str
) -> float | None:
    """The value for a layer: of the first pattern that matches its name, as PEFT does it, else the common one."""
    for pattern, number in patterns.items():
        if pattern.match(layer):
            return number
    if len(set(values.values())) > 1:
        said = ", ".join(f"{name.strip()} {number:g}" for name, number in values.items())
        raise LoraError(f"{source}: {what} contradict each other: {said}. Remove the wrong one.")
    return next(iter(values.values()), None)
