"""The table of settings against Request: each field has one row, and each spelling means one field."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from lightx2v.config.lightx2v_keys import ALIASES
from lightx2v.config.presets import resolve
from lightx2v.config.request import Request
from lightx2v.config.request_settings import SETTINGS, SHOWN

FIELDS = {field.name for field in dataclasses.fields(Request)}


def test_every_field_that_a_person_sets_has_one_row() -> None:
    # The task follows from the model; LoRAs are rows of files, which each front end takes in its own way.
    assert FIELDS == {*SHOWN, *SETTINGS, "task", "loras"}


def test_every_spelling_means_one_field() -> None:
    words = Counter(word for row in SETTINGS.values() for word in (row.name, *row.aliases))
    assert max(words.values()) == 1


@pytest.mark.parametrize("alias", ALIASES)
def test_every_spelling_is_a_preset_key(alias: str) -> None:
    row = SETTINGS[ALIASES[alias]]
    value = resolve("t2v_base").request[row.name]
    assert resolve("t2v_base", {alias: value}).request[row.name] == value


def test_every_row_explains_itself_in_one_line() -> None:
    assert all(row.help and "\n" not in row.help for row in (*SHOWN.values(), *SETTINGS.values()))
