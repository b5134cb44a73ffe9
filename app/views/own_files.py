"""What a person has: the folders with models, the files that a choice uses, and the shelf of LoRAs."""

from collections.abc import Collection, Mapping, Sequence
from urllib.parse import quote

from lightx2v.catalog.catalog import FoundLora
from lightx2v.catalog.found_file import FoundFile
from lightx2v.catalog.found_model import FoundModel, doubts
from lightx2v.catalog.live_catalog import LiveCatalog
from lightx2v.config.presets import PresetInfo
from lightx2v.errors import short_path

from ..backend.offer import FoundPreset
from ..strings import Words
from .html import button, esc, tag

SHOWN = 24
"""LoRAs on the shelf, and models and unusable files in their lists, at one time; searching finds the others."""


def model_words(words: Words, model: PresetInfo, steps: int) -> tuple[str, str]:
    """Title and description of a found model in the list of presets."""
    title = words("found_title", name=model.name.partition("+")[0], n=steps)
    lora = model.name.partition("+")[2]
    return title, words("found_lora", summary=model.summary, lora=lora) if lora else model.summary


def used_files(words: Words, model: FoundModel | None) -> str:
    """The files of a model, those that come from the Hub, and what may be a mistake; "" for other presets."""
    if model is None:
        return ""
    absent = {"part_text": model.text_encoder, "part_vae": model.vae, "part_tokenizer": model.tokenizer}
    missing = [words(key) for key, file in absent.items() if file is None]
    lines = [words("uses", files=", ".join(file.name for file in model.files))]
    lines += [words("from_hub", parts=", ".join(missing))] if missing else []
    notes = "".join(tag("p", esc(doubt), class_="tight") for doubt in doubts(model))
    return tag("div", "".join(tag("p", esc(line), class_="quiet") for line in lines) + notes, class_="uses")


def model_list(words: Words, found: Mapping[str, FoundPreset], search: str, chosen: str) -> str:
    """The found models that match a search, each with a button that chooses it."""
    parts = search.lower().split()
    if not parts:
        return ""
    texts = {name: f"{name} {each.model.summary}" for name, each in found.items()}
    matching = [name for name, text in texts.items() if all(part in text.lower() for part in parts)]
    rows = ""
    for name in matching[:SHOWN]:
        facts = tag("div", tag("strong", esc(name)) + tag("span", esc(found[name].model.summary), class_="quiet"))
        use = button(words("use_model"), "use_model", kind="small", name=words("use_model_name", name=name), model=name)
        rows += tag("li", facts + use, class_="taken" if name == chosen else None)
    more = words("lora_more", n=len(matching) - SHOWN) if len(matching) > SHOWN else ""
    more = more or ("" if matching else words("model_no_match"))
    return tag("ul", rows, class_="shelf models") + (tag("p", esc(more), class_="quiet") if more else "")


def folder_list(words: Words, catalog: LiveCatalog, told: Collection[str]) -> str:
    """The folders that are looked through, and what was found there."""
    found = catalog.catalog
    rows = []
    for folder in catalog.folders:
        name = short_path(folder)
        forget = words("forget_folder", name=name)
        tool = button("×", "forget_folder", kind="small", name=forget, folder=name) if str(folder) in told else ""
        rows.append(tag("li", tag("span", esc(name)) + tool))
    state = words("looking") if catalog.scanning else ""
    if not state and found.files:
        state = words(
            "found_count", experts=len(found.of_kind("expert")), models=len(found.models), loras=len(found.loras)
        )
    line = tag("span", esc(state or words("folders_none")), class_="quiet", role="status")
    head = tag("span", esc(words("folders")), class_="label")
    again = button(words("look_again"), "look_again", kind="small")
    folders = head + tag("ul", "".join(rows), class_="folders") + tag("div", again + line, class_="row")
    return folders + _unusable(words, [file for file in found.files if file.problem])


def _unusable(words: Words, files: Sequence[FoundFile]) -> str:
    """Why files that were recognised cannot be used, folded."""
    if not files:
        return ""
    rows = "".join(tag("li", tag("strong", esc(file.name)) + " " + esc(file.problem)) for file in files[:SHOWN])
    rows += tag("li", esc(words("lora_more", n=len(files) - SHOWN))) if len(files) > SHOWN else ""
    return tag(
        "details", tag("summary", esc(words("unusable_files", n=len(files)))) + tag("ul", rows), class_="unusable"
    )


def shelf(words: Words, loras: Sequence[FoundLora], search: str, task: str, added: Collection[str]) -> str:
    """Cards of the LoRAs that match a search, those for the task first. `added` are the names of chosen files."""
    if not loras:
        return tag("p", esc(words("lora_none")), class_="quiet")
    parts = search.lower().split()
    matching = [lora for lora in loras if all(part in _text(lora) for part in parts)]
    matching.sort(key=lambda lora: (lora.first.task not in (None, task), lora.name.lower()))
    cards = "".join(_card(words, lora, added) for lora in matching[:SHOWN])
    more = words("lora_more", n=len(matching) - SHOWN) if len(matching) > SHOWN else ""
    more = more or ("" if matching else words("lora_no_match"))
    return tag("ul", cards, class_="shelf") + (tag("p", esc(more), class_="quiet") if more else "")


def _text(lora: FoundLora) -> str:
    return " ".join([lora.name, *lora.triggers, lora.first.trained_for, lora.first.task or ""]).lower()


def _card(words: Words, lora: FoundLora, added: Collection[str]) -> str:
    picture = tag("span", "", class_="nopicture")
    if any(file.thumbnail for file in lora.files):
        picture = tag("img", src=f"studio/loras/{quote(lora.name)}.jpg", alt="", loading="lazy")
    first = lora.first
    facts = [words(_place(lora)), first.task or "", words("lora_rank", n=first.rank) if first.rank else ""]
    facts.append(words("lora_for", name=first.trained_for) if first.trained_for else "")
    chips = "".join(
        button(word, "trigger", kind="chip", name=words("lora_trigger", word=word), text=word) for word in lora.triggers
    )
    texts = tag("strong", esc(lora.name)) + tag("span", esc(" · ".join(filter(None, facts))), class_="quiet")
    texts += tag("span", chips, class_="row") if chips else ""
    taken = all(file.name in added for file in lora.files)
    label = words("lora_added" if taken else "lora_add")
    add = button(label, "lora_add", kind="small", name=words("lora_add_name", name=lora.name), lora=lora.name)
    return tag("li", picture + tag("div", texts) + add, class_="taken" if taken else None)


def _place(lora: FoundLora) -> str:
    if lora.high is not None and lora.low is not None:
        return "lora_both" if lora.high.path == lora.low.path else "lora_pair"
    return "lora_high_only" if lora.low is None else "lora_low_only"
