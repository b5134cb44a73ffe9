"""Load tensors into a module, one at a time, all or nothing.

The module is built on the meta device and needs no memory. Each tensor is cast and moved as it comes; the parameters
are assigned only after the last one fitted, so a module is never half loaded. Memory holds the finished part and the
few tensors that are read ahead. A module that got its memory before is filled in place.

A stream is any iterable of (name, tensor), so reading, renaming, merging a LoRA and quantising are chained generators.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ..errors import CheckpointError, short_path
from ..progress import UNWATCHED, LoadWatch
from .checkpoint import Checkpoint
from .host_writer import HostWriter
from .tensor_file import FLOATS
from .value_check import ValueCheck

TensorStream = Iterable[tuple[str, torch.Tensor]]
DtypeOf = Callable[[str], torch.dtype]
InHost = Callable[[nn.Module, nn.ModuleList, DtypeOf], None]
"""Gives a module on the meta device, with these blocks and dtypes, memory on the host."""


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype_of: DtypeOf,
    device: torch.device | str,
    names: Mapping[str, str] | None = None,
    transform: Callable[[TensorStream], TensorStream] = iter,
    watch: LoadWatch = UNWATCHED,
) -> None:
    """Load an unmodified checkpoint into `module` (on the meta device): compare the headers, then read.

    `names` maps the file's names to the module's where they differ; `transform` maps the stream, e.g. broadcasts it to
    other processes.
    """
    source, names = short_path(checkpoint.path), names or {name: name for name in checkpoint.shapes}
    shapes = {name: checkpoint.shapes[theirs] for theirs, name in names.items()}
    dtypes = {name: checkpoint.dtypes[theirs] for theirs, name in names.items()}
    check_fit(module, shapes, dtypes, source_name=source)
    check = ValueCheck(source)
    read = checkpoint.tensors(
        names,
        dtype_of=lambda theirs: dtype_of(names[theirs]),
        device=device,
        look=lambda theirs, part: check.look(names[theirs], part),
        watch=watch,
    )
    tensors = ((names[theirs], tensor) for theirs, tensor in read)
    stream_into(module, transform(tensors), dtype_of=dtype_of, device=device, check=check)


def stream_into(
    module: nn.Module, tensors: TensorStream, *, dtype_of: DtypeOf, device: torch.device | str, check: ValueCheck
) -> None:
    """Fill `module` from `tensors`. One CheckpointError names all tensors that do not fit, or a bad one of `check`.

    A module on the meta device gets its memory on `device`: ordinary floats become `dtype_of(name)`; float8 and integer
    tensors keep their dtype and need a slot of that dtype. A module that has memory keeps it, and what was not read
    into its slots is copied there; after an error it is of no use.
    """
    slots = slots_of(module)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    placed: dict[str, torch.Tensor] = {}
    fits, source_name = True, check.source
    with HostWriter() as writer:
        for name, tensor in tensors:
            if name in shapes:
                raise CheckpointError(f"{source_name}: tensor {name} came twice.")
            shapes[name], dtypes[name] = tuple(tensor.shape), tensor.dtype
            fits = fits and name in slots and not _misfit(slots[name], shapes[name], tensor.dtype)
            if fits:
                check.see(name, tensor)
            if fits and slots[name].is_meta:
                placed[name] = _place(tensor, slots[name], dtype_of(name), device)
            elif fits:
                _copy(slots[name].detach(), tensor, writer)
            else:
                placed.clear()  # the remaining tensors only complete the message
            del tensor  # before the next one is read
        writer.finish()
    check_fit(module, shapes, dtypes, source_name=source_name)
    check.finish()
    for name, tensor in placed.items():
        _assign(module, name, tensor)
    stranded = [name for name, slot in (*module.named_parameters(), *module.named_buffers()) if slot.is_meta]
    if stranded:
        raise RuntimeError(f"{type(module).__name__} has buffers that no checkpoint fills: {stranded[:5]}")


def check_fit(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], *, source_name: str
) -> None:
    """Compare a checkpoint's headers with `module`: refuses a wrong model before its gigabytes are read."""
    slots = slots_of(module)
    missing = [name for name in slots if name not in shapes]
    unexpected = [name for name in shapes if name not in slots]
    misfits = [
        f"{name} {why}"
        for name, slot in slots.items()
        if name in shapes and (why := _misfit(slot, shapes[name], dtypes[name]))
    ]
    parts = [
        f"{len(names)} {problem}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("not fitting", misfits))
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{source_name} does not fit {type(module).__name__} ({len(slots)} tensors expected, {len(shapes)} found). "
            f"{'; '.join(parts)}. Is it a file of another model?"
        )


def slots_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, as in a state dict."""
    return module.state_dict(keep_vars=True)


def _misfit(slot: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    if shape != tuple(slot.shape):
        return f"has shape {list(shape)}, expected {list(slot.shape)}"
    castable = dtype in FLOATS and slot.dtype in FLOATS
    if not castable and dtype != slot.dtype:
        return f"has dtype {_name(dtype)}, expected {'a float' if slot.dtype in FLOATS else _name(slot.dtype)}"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(tensor: torch.Tensor, slot: torch.Tensor, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    moved = tensor.to(device)  # first, so that an accelerator does the cast
    return moved.to(dtype) if slot.dtype in FLOATS else moved


def _copy(slot: torch.Tensor, tensor: torch.Tensor, writer: HostWriter) -> None:
    if tensor.data_ptr() == slot.data_ptr():
        return
    if tensor.is_cuda and slot.is_cpu and tensor.dtype == slot.dtype and slot.is_contiguous():
        writer.write(slot, tensor.contiguous())
    else:
        slot.copy_(tensor)


def _assign(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
