"""Settings: one video (Request), the engine (EngineConfig), and the presets that fill both."""

from .engine_config import EngineConfig, ParallelConfig
from .environment import Environment
from .model_paths import PROJECT, search_roots
from .presets import PresetInfo, Resolved, list_presets, read_json, resolve
from .request import Request

__all__ = [
    "PROJECT",
    "EngineConfig",
    "Environment",
    "ParallelConfig",
    "PresetInfo",
    "Request",
    "Resolved",
    "list_presets",
    "read_json",
    "resolve",
    "search_roots",
]
