"""From names on the Hub to files on this machine.

    plan = make_plan(config)        # what a model needs, what is here, exact bytes, free disk
    fetch(plan, meter=meter)        # download the rest, with progress; resume a partial file
    ensure(config, meter=meter)     # both, if a file is missing; loading a model does this first
    find(path, config)              # the local file or folder of a path, or None

Files go to the cache that all programs share (`cache.py`): a file that diffusers or `hf download` has fetched is
not fetched again. huggingface_hub gives metadata, addresses and permissions. Since 1.18 it deletes the partial file of
a failed download (`_download_to_tmp_and_move` in its `file_download.py`), so that 28 GB would start over; that is why
`transfer.py` exists. Once `hf_hub_download` resumes partial files again, it can replace `transfer.py` and the event
loop in `download.py`.
"""

from .download import ensure, fetch
from .find import find, find_all, find_cached, find_lora, find_part, local_places, model_folder
from .listing import Hub
from .plan import DownloadPlan, PlannedFile, make_plan, missing

__all__ = [
    "DownloadPlan",
    "Hub",
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
