"""LightX2V: text and images to video with Wan2.2-A14B, two experts, in-process.

Importing this package loads neither torch nor gradio; the names below are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .config.engine_config import EngineConfig
    from .config.request import Request
    from .pipeline import LightX2VPipeline

__version__ = "0.1.0"
__all__ = ["EngineConfig", "LightX2VPipeline", "Request", "errors"]

_HOME = {"EngineConfig": ".config", "LightX2VPipeline": ".pipeline", "Request": ".config", "errors": ".errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOME[name], __name__)
    return module if name == "errors" else getattr(module, name)
