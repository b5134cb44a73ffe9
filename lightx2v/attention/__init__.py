"""Attention: one table of backends, each tested on the device before it is used.

`config/attention_names.py` has the names that presets use.
"""

from .table import Choice, resolve_attention

__all__ = ["Choice", "resolve_attention"]
