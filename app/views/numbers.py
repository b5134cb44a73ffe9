"""Numbers for people: times and sizes in one format everywhere on the page."""

GIBIBYTE = 2**30
NARROW = "\u202f"
"""The narrow no-break space between a number and its unit."""


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
    """An estimated time, with no more digits than it deserves."""
    if value < 10:
        return f"{value:.1f}{NARROW}s"
    if value < 120:
        return f"{value:.0f}{NARROW}s"
    if value < 3600:
        return f"{value / 60:.0f}{NARROW}min"
    if value < 48 * 3600:
        return f"{value / 3600:.1f}{NARROW}h"
    return f"{value / 86400:.0f}{NARROW}d"


def memory(value: float) -> str:
    """Bytes of memory in GiB, as drivers count them, or in MiB below one GiB."""
    if value < GIBIBYTE:
        return f"{value / 2**20:.0f}{NARROW}MiB"
    return f"{value / GIBIBYTE:.1f}{NARROW}GiB"


def size(value: float) -> str:
    """Bytes of a file in GB, as disks are sold."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= step:
            return f"{value / step:.1f}{NARROW}{unit}"
    return f"{value:.0f}{NARROW}B"
