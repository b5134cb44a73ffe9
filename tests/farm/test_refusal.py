"""Why a machine cannot hold a model: its files, or its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import TinyModels

from lightx2v.config.engine_config import EngineConfig
from lightx2v.cost.machine import Machine
from lightx2v.farm.refusal import refusal_of

MACHINE = Machine(name="box", cores=2, ram_free=1, ram_total=2**34)


@pytest.fixture
def config(tiny: TinyModels) -> EngineConfig:
    return EngineConfig(model_path=str(tiny.t2v), model_cls="wan2.2_moe", task="t2v")


def test_a_model_that_is_here_and_fits_is_held_whatever_is_loaded_now(config: EngineConfig) -> None:
    assert refusal_of(config, MACHINE) == ""
    assert refusal_of(config, replace(MACHINE, vram_free=1, vram_total=2**33)) == ""


def test_a_missing_file_is_named(config: EngineConfig, tiny: TinyModels) -> None:
    lacking = replace(config, high_noise_original_ckpt=str(tiny.t2v / "nothing.safetensors"))
    assert "nothing.safetensors" in refusal_of(lacking, MACHINE)


def test_a_model_of_the_hub_that_cannot_be_downloaded_is_refused(config: EngineConfig) -> None:
    """The Hub is out of reach here."""
    assert refusal_of(replace(config, model_path="Someone/Some-Model"), MACHINE)


def test_a_model_that_does_not_fit_is_refused_with_the_size_of_the_memory(config: EngineConfig) -> None:
    assert refusal_of(config, replace(MACHINE, ram_total=2**20)) == (
        "The model does not fit into the 1.05 MB of memory of box."
    )
