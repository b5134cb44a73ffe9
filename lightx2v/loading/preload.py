"""Import slow packages in a thread while the program does something else.

torch and transformers take about six seconds to import on a small machine. A program that will load a model calls
`start` at its own start; loading then waits only for the rest.
"""

import threading


def start() -> threading.Thread:
    """Start importing the packages that loading a model needs. May be called again; loading reports a failure."""
    thread = threading.Thread(target=_import, name="lightx2v-preload", daemon=True)
    thread.start()
    return thread


def _import() -> None:
    try:
        from ..models.umt5 import preload

        preload()
    except ImportError:
        pass  # loading a model imports the same and names the missing package
