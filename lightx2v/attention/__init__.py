"""Attention: one table of backends, each tested on the device before it is used.

Importing this package does not import torch. `config/attention_names.py` has the names that presets use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .table import Choice, resolve_attention

__all__ = ["Choice", "resolve_attention"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import table

    return getattr(table, name)
