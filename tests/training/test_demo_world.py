"""The demo's world: clips loop, the detector reads them, the grammar is read back, held-out combinations stay out."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from lightx2v.config.prompt_cleaning import clean_prompt
from training.captions import LANGUAGES, OFFICIAL_NEGATIVE, caption, read
from training.detector import detect
from training.text import ROWS, tokenise
from training.tokenizer import build_tokenizer, save_tokenizer
from training.world import (
    ATTRIBUTES,
    COMBINATIONS,
    FRAMES,
    held_out,
    place_clips,
    render,
    sample_clips,
    split_combination,
)

UNKNOWN = 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_words(chance: random.Random) -> dict[str, str]:
    return {name: chance.choice(values) for name, values in ATTRIBUTES.items()}


@pytest.mark.slow
def test_detector_reads_every_attribute_of_drawn_clips() -> None:
    clips = sample_clips(48, generator(1), split="all")
    # every kind, colour and motion is there, several times
    n = torch.arange(48)
    clips = dataclasses.replace(clips, kind=n % 6, colour=n % 8, motion=(n // 2) % 8)
    right = detect(render(clips)).matches(clips)
    assert right["all"].float().mean() >= 0.98, {name: value.tolist() for name, value in right.items()}


@pytest.mark.slow
def test_detector_sees_through_blur_and_noise() -> None:
    clips = sample_clips(16, generator(2), split="all")
    video = render(clips)
    frames = video.transpose(1, 2).flatten(0, 1)
    blurred = torch.nn.functional.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    blurred = blurred.unflatten(0, (16, -1)).transpose(1, 2) + 0.04 * torch.randn(video.shape, generator=generator())
    assert detect(blurred).matches(clips)["all"].float().mean() >= 0.9


def test_detector_finds_nothing_in_an_empty_landscape() -> None:
    clips = sample_clips(4, generator(3))
    away = dataclasses.replace(clips, radius=torch.full((4,), 1e-3))
    reading = detect(render(away))
    assert (reading.kind == -1).all()
    assert (reading.motion == -1).all()
    assert torch.equal(reading.time, clips.time)


def test_detector_tells_a_wrong_clip() -> None:
    clips = sample_clips(8, generator(4))
    other = dataclasses.replace(clips, colour=(clips.colour + 1) % 8)
    assert not detect(render(clips)).matches(other)["all"].any()


@pytest.mark.slow
def test_clips_loop_without_a_jump() -> None:
    clips = sample_clips(12, generator(5), split="all")
    twice = render(clips, 2 * FRAMES)
    assert torch.allclose(twice[:, :, :FRAMES], twice[:, :, FRAMES:], atol=2e-3)


def test_a_seed_gives_the_same_clips() -> None:
    first, second = (sample_clips(3, generator(6)) for _ in range(2))
    assert torch.equal(render(first, 2), render(second, 2))
    assert not torch.equal(render(first, 2), render(sample_clips(3, generator(7)), 2))


def test_combination_numbers_are_a_bijection() -> None:
    every = torch.arange(COMBINATIONS)
    clips = place_clips(every, generator())
    assert torch.equal(clips.combination, every)
    assert set(split_combination(every)) == set(ATTRIBUTES)


def test_held_out_combinations_are_never_in_training() -> None:
    every = torch.arange(COMBINATIONS)
    share = held_out(every).float().mean()
    assert 0.13 < share < 0.17
    assert not held_out(sample_clips(4000, generator(8), split="train").combination).any()
    assert held_out(sample_clips(200, generator(9), split="held_out").combination).all()
    # every value of every attribute, and every pair of values, is still shown
    parts = {name: values[~held_out(every)] for name, values in split_combination(every).items()}
    for name, values in parts.items():
        assert len(values.unique()) == len(ATTRIBUTES[name])
    assert len((parts["kind"] * 8 + parts["colour"]).unique()) == 48


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_grammar_reads_what_it_writes(language: str) -> None:
    chance = random.Random(0)
    for _ in range(1500):
        words = random_words(chance)
        text = caption(words, chance, language=language)
        assert read(text) == (words, []), text


def test_captions_may_leave_things_open() -> None:
    chance = random.Random(1)
    said = [read(caption(random_words(chance), chance, drop=0.5)) for _ in range(300)]
    assert any(len(found) == 1 for found, _ in said)
    assert all(unknown == [] for _, unknown in said)


def test_words_outside_the_world_are_named() -> None:
    assert read("a robot dances at night") == ({"time": "night"}, ["robot", "dances"])
    assert read("夜晚的草地上，一只恐龙")[1] == ["恐龙"]


def test_every_word_of_the_grammar_is_in_the_vocabulary() -> None:
    tokenizer = build_tokenizer()
    phrases = [
        phrase
        for tables in LANGUAGES.values()
        for words in tables.values()
        for group in words.values()
        for phrase in group
    ]
    for phrase in phrases:
        assert UNKNOWN not in tokenizer.encode(phrase).ids, phrase


def test_unknown_words_become_unknown_tokens() -> None:
    assert UNKNOWN in build_tokenizer().encode("a robot").ids
    assert build_tokenizer().encode("").ids == [1]


def test_no_caption_is_longer_than_the_trained_rows() -> None:
    chance = random.Random(2)
    texts = [caption(random_words(chance), chance) for _ in range(2000)] + [OFFICIAL_NEGATIVE]
    assert max(len(encoding.ids) for encoding in build_tokenizer().encode_batch(texts)) <= ROWS
    ids = tokenise([OFFICIAL_NEGATIVE, ""])
    assert ids.shape == (2, ROWS)
    assert ids[1].tolist() == [1] + [0] * (ROWS - 1)


def test_the_engine_cleans_a_prompt_without_changing_what_the_model_reads() -> None:
    chance = random.Random(3)
    texts = [caption(random_words(chance), chance) for _ in range(1000)] + [OFFICIAL_NEGATIVE]
    cleaned = [clean_prompt(text) for text in texts]
    assert sum(text != clean for text, clean in zip(texts, cleaned, strict=True)) > 100  # ， becomes ,
    assert torch.equal(tokenise(cleaned), tokenise(texts))
    assert len(build_tokenizer().encode(cleaned[-1]).ids) <= ROWS


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("夜晚的草地上,红色的球滚动.", "夜晚的草地上，红色的球滚动。"),
        ("red ball,blue box", "red ball blue box"),
        ("A red ball, at night.", "a red ball at night"),
    ],
)
def test_punctuation_of_any_width_means_nothing(text: str, same: str) -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode(text).tokens == tokenizer.encode(same).tokens


@pytest.mark.slow
def test_autotokenizer_reads_the_saved_folder(tmp_path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "夜晚的草地上，一个红色的球向左滚动"
    assert tokenizer(text)["input_ids"] == build_tokenizer().encode(text).ids
    padded = tokenizer("a red ball", padding="max_length", max_length=8)
    assert padded["input_ids"][-1] == 0
