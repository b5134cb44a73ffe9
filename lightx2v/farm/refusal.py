"""Why a machine cannot hold a model: its files are not there and cannot come, or its memory is too small."""

from dataclasses import replace

from ..config.engine_config import EngineConfig
from ..config.request import Request
from ..cost.machine import Machine
from ..cost.memory_forecast import forecast_for_machine
from ..errors import LightX2VError, byte_size
from ..hub.plan import make_plan, missing
from ..loading.model_files import locate

SMALLEST = Request(prompt="a cat", height=256, width=256, frames=5)
"""A video that fits wherever any does."""


def refusal_of(config: EngineConfig, machine: Machine) -> str:
    """A sentence; "" where the model can be loaded. Asks the Hub for the sizes of what would be downloaded."""
    try:
        if missing(config):
            make_plan(config).check_space()
        else:
            locate(config)
        # All of the memory: a model that is loaded now makes way for the next one.
        whole = replace(machine, ram_free=machine.ram_total, vram_free=machine.vram_total)
        found = forecast_for_machine(config, SMALLEST, whole)
    except LightX2VError as error:
        return str(error)
    if found.fits:
        return ""
    kind = "GPU memory" if machine.gpu and config.device != "cpu" else "memory"
    return f"The model does not fit into the {byte_size(found.free)} of {kind} of {machine.name}."
