"""Numbers as people read them: the same form everywhere on the page, with figures of equal width."""

from __future__ import annotations

GIBIBYTE = 2**30
NARROW = "\u202f"
"""A narrow space that does not break: between a number and its unit."""


def seconds(value: float) -> str:
    """0.84 s, 18.9 s, 3 min 12 s, 2 h 05 min, 15 d."""
    if value < 1:
        return f"{value:.2f}{NARROW}s"
    if value < 119.95:
        return f"{value:.1f}{NARROW}s"
    if value < 3600:
        return f"{int(value + 0.5) // 60}{NARROW}min {int(value + 0.5) % 60:02}{NARROW}s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}{NARROW}h {minutes % 60:02}{NARROW}min"
    return f"{round(value / 86400)}{NARROW}d"


def about(value: float) -> str:
    """A time that is not exact: no digits that it does not have."""
    if value < 10:
        return f"{value:.1f}{NARROW}s"
    if value < 120:
        return f"{value:.0f}{NARROW}s"
    if value < 3600:
        return f"{value / 60:.0f}{NARROW}min"
    if value < 48 * 3600:
        return f"{value / 3600:.1f}{NARROW}h"
    return f"{value / 86400:.0f}{NARROW}d"


def clock(value: float) -> str:
    """0:07, 1:01, 1:02:03."""
    whole = max(0, int(value))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def memory(value: float) -> str:
    """Bytes of memory, as the drivers count them: GiB, or MiB under one of those."""
    if value < GIBIBYTE:
        return f"{value / 2**20:.0f}{NARROW}MiB"
    return f"{value / GIBIBYTE:.1f}{NARROW}GiB"


def size(value: float) -> str:
    """Bytes of a file, as shops count them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{value / step:.1f}{NARROW}{unit}"
    return f"{value:.0f}{NARROW}B"
