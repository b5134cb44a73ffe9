"""SavedStep: a run after one of its denoising steps, as bytes from which any process goes on to the same video.

    data = saved.to_bytes()                 one safetensors file: tensors, and the rest as JSON in its metadata
    saved = SavedStep.from_bytes(data)      checked by a hash; CheckpointError if the bytes are damaged

It holds the latents, the solver's state and both conditions, so neither the text encoder nor the VAE's encoder runs
again. `made_by` names everything that decides a video's bits; a run goes on only where all of it is the same.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..config.engine_config import EngineConfig
from ..config.lora_spec import LoraSpec
from ..config.recorded_settings import PICTURES, content_hash
from ..config.request import Request
from ..errors import CheckpointError, OutputError, quoted
from ..loading.lora_experts import lora_files
from ..sampling import SolverState
from ..step_file import StepStore
from ..weights.content_digest import content_digest
from ..weights.safetensors_writer import header_of
from .engine import LoadedEngine

NUMERICS = 1
"""Version of the computation. Raise it with every change after which a request gives other latents."""

FORMAT = 1
HEAD, DIGEST = "lightx2v_saved_step", "sha256"
"""Keys of the file's metadata: everything but the tensors, and the hash of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedStep:
    """`step` of `steps` denoising steps are done.

    `contexts` are the text encoder's states (L, D), `condition` is (20, T, h, w) or None, as in Denoising. `tokens` and
    `warnings` are what the report says about stages that do not run again.
    """

    step: int
    steps: int
    latents: Tensor
    solver_state: SolverState
    contexts: Sequence[Tensor]
    condition: Tensor | None
    made_by: dict[str, Any]
    tokens: dict[str, int]
    warnings: Sequence[str]

    @property
    def seed(self) -> int:
        return self.made_by["request"]["seed"]

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything but the tensors, as JSON, and the tensors by name."""
        head = {
            "format": FORMAT,
            "step": self.step,
            "steps": self.steps,
            "made_by": self.made_by,
            "tokens": self.tokens,
            "warnings": list(self.warnings),
        }
        tensors = {"latents": self.latents}
        tensors |= {f"solver.{name}": tensor for name, tensor in self.solver_state.items()}
        tensors |= {f"context.{index}": tensor for index, tensor in enumerate(self.contexts)}
        if self.condition is not None:
            tensors["condition"] = self.condition
        return head, tensors

    @classmethod
    def from_parts(cls, head: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Raises KeyError where something is missing."""
        solver = {
            name.removeprefix("solver."): tensor for name, tensor in tensors.items() if name.startswith("solver.")
        }
        contexts = sum(name.startswith("context.") for name in tensors)
        return cls(
            **{key: head[key] for key in ("step", "steps", "made_by", "tokens", "warnings")},
            latents=tensors["latents"],
            solver_state=solver,
            contexts=[tensors[f"context.{index}"] for index in range(contexts)],
            condition=tensors.get("condition"),
        )

    def on(self, place: Callable[[Tensor], Tensor]) -> Self:
        """The same step with its tensors moved by `place`."""
        head, tensors = self.parts()
        return self.from_parts(head, {name: place(tensor) for name, tensor in tensors.items()})

    def to_bytes(self) -> bytes:
        head, tensors = self.parts()
        text = json.dumps(head)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        raw = [tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors.values()]
        infos = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
        header, _ = header_of({"": infos}, {HEAD: text, DIGEST: _digest(text, tensors, raw)})
        return b"".join([header, *raw])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        try:
            # Checks sizes and offsets. Copies lie as torch aligns them: some CPU kernels round by alignment.
            tensors = {name: tensor.clone() for name, tensor in load(data).items()}
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            if metadata[DIGEST] != _digest(metadata[HEAD], tensors, [memoryview(data)[8 + length :]]):
                raise ValueError("its content does not match its hash")
            head = json.loads(metadata[HEAD])
            if head["format"] != FORMAT:
                raise CheckpointError(f"the saved step has format {quoted(head['format'])}, expected {FORMAT}")
            return cls.from_parts(head, tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"the saved step is damaged ({type(error).__name__}: {error!s:.100})") from None

    def check(self, made_by: dict[str, Any]) -> None:
        """Raise CheckpointError unless a run that is `made_by` this goes on with the same bits."""
        if differences := [*_differences(self.made_by, made_by)]:
            raise CheckpointError(f"the saved step is of another run: {', '.join(differences)}")


def saved_step_for(
    store: StepStore, engine: LoadedEngine, request: Request, loras: Sequence[LoraSpec]
) -> tuple[SavedStep | None, str]:
    """The step from which this run goes on. None to begin at the start, with a warning if there is one of no use.

    A seed of -1 is the saved run's.
    """
    try:
        if (data := store.read()) is None:
            return None, ""
        saved = SavedStep.from_bytes(data)
        seeded = replace(request, seed=saved.seed) if request.seed == -1 else request
        saved.check(made_by(engine, seeded, loras))
        return saved, ""
    except (CheckpointError, OutputError) as error:
        return None, f"The video was started over: {error}."


def made_by(engine: LoadedEngine, request: Request, loras: Sequence[LoraSpec]) -> dict[str, Any]:
    """Everything that decides the bits of a video: the computation, the weights, the settings."""
    mesh, device = engine.mesh, engine.precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    files = [file.path for expert in ("high", "low") for file in lora_files(loras, expert, engine.config)]
    return {
        "numerics": NUMERICS,
        "torch": torch.__version__,
        "device": f"{device.type} {name}",
        "attention": [engine.self_attention.kernels, engine.cross_attention.name],
        "processes": [mesh.cfg.size if mesh.cfg is not None else 1, mesh.group.size],
        "weights": engine.weights,
        "loras": [*(lora.to_json() for lora in loras), content_digest(files)],
        **settings(engine.config, request),
    }


def settings(config: EngineConfig, request: Request) -> dict[str, Any]:
    """The part of `made_by` that a command line knows before it loads the model. Pictures are named by their content,
    because their paths differ between machines."""
    pictures = {name: content_hash(path) for name in PICTURES if (path := getattr(request, name))}
    engine = {key: value for key, value in config.to_json().items() if key != "vram_gb"}  # changes no result
    return {"engine": engine, "request": request.to_json() | pictures}


def fits(saved: SavedStep, config: EngineConfig, request: Request) -> bool:
    """Whether the step is of this request on this engine, where a seed of -1 stands for any."""
    seeded = replace(request, seed=saved.seed) if request.seed == -1 else request
    return not [*_differences(saved.made_by, saved.made_by | settings(config, seeded))]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names of all settings that differ, and what differs of the rest."""
    found = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += [name for name in value if value[name] != before.get(name)]
        elif value != before:
            plain = isinstance(value, (str, int)) and key != "weights"
            found.append(f"{key} {quoted(before)}, now {quoted(value)}" if plain else f"other {key}")
    return found


def _digest(head: str, tensors: Mapping[str, Tensor], raw: Sequence[memoryview]) -> str:
    """The hash of a file's content; `raw` has the bytes of the tensors, as they lie in it."""
    kinds = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    digest = hashlib.sha256(f"{head}{kinds}".encode())
    for part in raw:
        digest.update(part)
    return digest.hexdigest()
