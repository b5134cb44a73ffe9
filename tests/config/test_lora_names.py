"""Names of LoRAs and experts as people publish them: which expert each is for, and the other expert's file."""

from __future__ import annotations

import pytest

from lightx2v.config.lora_names import expert_in, expert_of, pair_expert, partner_names, task_of

PAIRS = [
    # as published; each {} is "high" or "low" in the spelling of the second column
    ("wan2.2_t2v_{}_noise_14B_fp8_scaled.safetensors", "high"),
    ("wan2.2_i2v_{}_noise_14B_Q4_K_M.gguf", "high"),
    ("Wan2_2-T2V-A14B_{}_fp8_e4m3fn_scaled_KJ.safetensors", "HIGH"),
    ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_{}_noise.safetensors", "high"),
    ("SVI_Wan2.2-I2V-A14B_{}_noise_lora_v2.0_pro.safetensors", "high"),
    ("Wan2.2-Lightning_I2V-A14B-4steps-lora_{}_fp16.safetensors", "HIGH"),
    ("Wan2.2-Lightning/Seko-V1/{}_noise_model.safetensors", "high"),
    ("{0}Noise/Wan2.2-T2V-A14B-{0}Noise-Q4_K_M.gguf", "High"),
    ("Wan2.2-T2V-A14B/{}_noise_model", "high"),
    # as people spell it
    ("Wan22T2V{}Noise-style.safetensors", "High"),
    ("style {}-noise v2.safetensors", "high"),
    ("style.{}.Noise.safetensors", "High"),
    ("high/Style-{}.safetensors", "HIGH"),
    ("me/{}.safetensors", "high"),
    ("style_{}v2.safetensors", "high"),
    ("style-{}.safetensors", "hi"),
    ("Style{}_v1.safetensors", "Hi"),
    # the phrase decides; the word alone counts without one
    ("highres_{}_noise.safetensors", "high"),
    ("low_poly_{}_noise.safetensors", "high"),
    ("highlander_{}.safetensors", "high"),
    # a folder decides where the file's name says nothing
    ("loras/{}_noise/adapter_model.safetensors", "high"),
]


OTHER = {"high": "low", "High": "Low", "HIGH": "LOW", "hi": "lo", "Hi": "Lo"}


@pytest.mark.parametrize(("name", "word"), PAIRS)
def test_each_file_of_a_pair_names_its_expert_and_its_partner(name: str, word: str) -> None:
    high, low = (name.format(spelled) for spelled in (word, OTHER[word]))
    assert (expert_of(high), expert_of(low)) == ("high", "low")
    assert (partner_names(high)[0], partner_names(low)[0]) == (low, high)


@pytest.mark.parametrize(
    "name",
    [
        "highlander_style.safetensors",
        "lowlander_style.safetensors",
        "highlights-follow-flow.safetensors",
        "highres.safetensors",
        "yellow_noise.safetensors",
        "high_and_low.safetensors",
        "high_noise_to_low_noise.safetensors",
        "high/style.safetensors",
        "high_noise/loras/style.safetensors",
        "",
    ],
)
def test_a_name_without_one_expert_has_none_and_no_partner(name: str) -> None:
    assert expert_of(name) is None and partner_names(name) == []


def test_both_files_of_a_pair_may_lie_in_one_folder() -> None:
    assert partner_names("high_noise/a_high_noise.safetensors") == [
        "low_noise/a_low_noise.safetensors",
        "high_noise/a_low_noise.safetensors",
    ]


@pytest.mark.parametrize(
    ("text", "expert"),
    [
        ("Wan2.2 high noise expert", "high"),
        ("modelspec.title wan_low_noise", "low"),
        ("a high resolution model", None),
        ("from high noise to low noise", None),
    ],
)
def test_metadata_names_an_expert_by_the_phrase_only(text: str, expert: str | None) -> None:
    assert expert_in(text) == expert


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("wan2.2_i2v_A14b_high_noise_lora_rank64.safetensors", "i2v"),
        ("Wan22-T2V480p-style.safetensors", "t2v"),
        ("t2v_and_i2v.safetensors", None),
        ("style.safetensors", None),
    ],
)
def test_the_name_tells_the_task(name: str, task: str | None) -> None:
    assert task_of(name) == task


@pytest.mark.parametrize(("high", "low"), [("stylehigh.pt", "stylelow.pt"), ("STYLEHIGH2.pt", "STYLELOW2.pt")])
def test_two_files_that_differ_in_a_word_within_a_word_are_a_pair(high: str, low: str) -> None:
    assert (pair_expert(high, low), pair_expert(low, high)) == ("high", "low")
    assert expert_of(high) is None


@pytest.mark.parametrize(
    ("one", "other"), [("yellow.pt", "yellow2.pt"), ("highway.pt", "below.pt"), ("hi.pt", "hi2.pt")]
)
def test_two_names_that_differ_in_more_are_no_pair(one: str, other: str) -> None:
    assert pair_expert(one, other) is None
