"""The slow imports, made in a thread while the program does something else.

torch and transformers take about six seconds of imports on a small machine. A program that will load a model calls
`start` as it starts; loading then waits only for what is left.
"""

from __future__ import annotations

import threading


def start() -> threading.Thread:
    """Begins to import what loading a model needs. May be called again; a failure shows where a model is loaded."""
    thread = threading.Thread(target=_import, name="lightx2v-preload", daemon=True)
    thread.start()
    return thread


def _import() -> None:
    try:
        from ..models.umt5 import preload

        preload()
    except ImportError:
        pass  # whoever loads a model imports the same, and says what is missing
