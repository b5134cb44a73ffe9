"""What messages repeat of a user's input: little, on one line, and never what cannot be encoded. Errors of memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lightx2v.errors import MAX_SHOWN, OutOfMemory, is_out_of_memory, one_line, quoted, short_path


def test_short_values_are_shown_as_python_writes_them() -> None:
    assert [quoted(value) for value in ("a cat", 18, None, [1, "x"])] == ["'a cat'", "18", "None", "[1, 'x']"]


@pytest.mark.parametrize("value", ["A" * 5000, ["A" * 5000], {"A" * 5000: 1}, b"A" * 5000, list(range(5000)), 10**4000])
def test_long_values_are_cut_and_counted(value: object) -> None:
    shown = quoted(value)
    assert len(shown) <= MAX_SHOWN + 10 and shown.startswith(repr(value)[:50]) and f"({len(repr(value))} char" in shown


def test_a_number_that_python_does_not_convert_is_named() -> None:
    assert quoted(10**5000) == "a huge number"


@pytest.mark.parametrize("text", ["half \ud83d", "two\nlines", "\x1b[31mred", "\u202eback", "nul\0"])
def test_values_and_paths_stay_on_one_line_that_can_be_encoded(text: str) -> None:
    for shown in (quoted(text), one_line(text), short_path(f"folder/{text}")):
        assert shown.isprintable() and shown.encode()


def test_a_path_shows_its_last_parts() -> None:
    assert short_path("/home/user/models/low.safetensors") == "…/models/low.safetensors"
    assert short_path("low.safetensors") == "low.safetensors"
    assert short_path(Path("写真/Été à l'île.png")) == "写真/Été à l'île.png"


def test_a_long_name_loses_its_middle_and_keeps_its_suffix() -> None:
    shown = short_path("/models/" + "A" * 250 + ".safetensors")
    assert len(shown) <= MAX_SHOWN + 1 and shown.startswith("…/models/AAA") and shown.endswith("AAA.safetensors")


def test_a_name_that_is_no_text_is_escaped() -> None:
    """Linux allows any bytes in a name; Python reads them as half surrogates, which no JSON body can hold."""
    assert short_path(os.fsdecode(b"caf\xe9.png")) == r"caf\udce9.png"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemory("ours"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 70368744177664 bytes."),
        RuntimeError("unable to mmap 999 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_every_allocators_error_is_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
