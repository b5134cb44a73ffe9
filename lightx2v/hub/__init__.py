"""From names on the Hub to files on this machine.

    plan = make_plan(config)        # what a model needs, what is here, exact bytes, free disk
    fetch(plan, meter=meter)        # the rest, with progress; goes on inside a file after any break
    ensure(config, meter=meter)     # both, and nothing where all is here: what loading a model does first
    find(name, config)              # the local file or folder of a name, or None

Files go to the cache that all programs share (`cache.py`), so what diffusers or `hf download` fetched is not fetched
again. huggingface_hub gives metadata, addresses and permissions; since 1.18 it starts an interrupted file over, so the
transfer itself is ours (`transfer.py`).
"""

from __future__ import annotations

from .download import ensure, fetch
from .find import find, find_all, find_cached, find_lora, find_part, local_places, model_folder
from .listing import Hub
from .plan import DownloadPlan, PlannedFile, make_plan, missing

__all__ = [
    "Hub",
    "DownloadPlan",
    "PlannedFile",
    "ensure",
    "fetch",
    "find",
    "find_all",
    "find_cached",
    "find_lora",
    "find_part",
    "local_places",
    "make_plan",
    "missing",
    "model_folder",
]
