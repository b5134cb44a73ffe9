"""How much memory a run will take: the engine's own choice of a plan, made before anything is loaded."""

from dataclasses import dataclass
from typing import Any

from ..config.engine_config import EngineConfig
from ..config.request import Request
from .machine import Machine
from .memory_bytes import host_bytes, stage_bytes
from .memory_ladder import RESERVE, MemoryPlanner, card_bytes, usable
from .memory_plan import GIB, MemoryPlan, OffloadOptions, plan_from_disk, workload_of
from .model_size import model_size

ENOUGH = 2**62
"""Host memory that always suffices, for a forecast of how much host memory a GPU needs beside its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """`plan.bytes` are empty without a GPU. `host`: bytes of the weights that wait in host memory; without a GPU, the
    bytes of everything. `free`: free bytes of the memory that has to hold the run."""

    plan: MemoryPlan
    host: int
    free: int
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """The forecast for reports, with sizes in GiB."""
        stages = {stage: _gib(size) for stage, size in self.plan.bytes.items()}
        return {
            "free_gib": _gib(self.free),
            "device_peak_gib": max(stages.values(), default=None),
            "device_gib": stages or None,
            "host_gib": _gib(self.host),
            "fits": self.fits,
            "plan": self.plan.reason,
        }


def forecast_for_gpu(config: EngineConfig, request: Request, size: float) -> Forecast:
    """The forecast for a GPU of `size` GB in a machine with enough host memory."""
    return forecast(config, request, vram=card_bytes(size), ram=ENOUGH)


def forecast_for_machine(config: EngineConfig, request: Request, machine: Machine) -> Forecast:
    """The forecast for the memory that is free on this machine now."""
    ram = machine.ram_free // (config.parallel.world_size if config.parallel else 1)
    if machine.vram_free is not None and config.device != "cpu":
        return forecast(config, request, vram=machine.vram_free, ram=ram)
    model = model_size(config, 4)  # products are computed in float32
    plan = MemoryPlan(mode="resident", resident_blocks=model.dit.num_layers, reason="All of it is in host memory.")
    if config.lazy_load:
        plan = plan_from_disk(config)
    peak = max(stage_bytes(plan, model, workload_of(request)).values())
    return Forecast(plan=plan, host=peak, free=ram, fits=peak <= ram)


def forecast(config: EngineConfig, request: Request, *, vram: int, ram: int) -> Forecast:
    """The forecast for these free bytes, under the plan that the engine will choose for them and for `vram_gb`."""
    vram = usable(vram, config.vram_gb)
    model = model_size(config, 2)
    planner = MemoryPlanner(vram=vram, ram=ram, model=model, options=OffloadOptions.of(config))
    plan = planner.plan(workload_of(request))
    fits = max(plan.bytes.values()) + RESERVE <= vram
    return Forecast(plan=plan, host=host_bytes(plan, model), free=vram, fits=fits)


def _gib(size: int) -> float:
    return round(size / GIB, 2)
