"""Load a model's networks, text encoder, experts and VAE: each from its files to a module on a device.

The architecture comes from the files; devices and precisions from the configuration. lightx2v/offload decides where
networks are while others run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..attention import Choice
from ..config.engine_config import EngineConfig
from ..config.phases import Expert
from ..errors import CheckpointError, ConfigError, short_path
from ..models.dit import DiTConfig, WanDiT, parameter_dtype
from ..models.gguf_linear import swap_for_blocks
from ..models.quant_linear import swap_linears
from ..models.umt5 import TextEncoder
from ..models.vae import WanVAE
from ..models.vae_config import VAEConfig
from ..parallel.process_group import Group
from ..parallel.single_process import ALONE
from ..progress import UNWATCHED, LoadWatch
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.model_weights import ModelWeights
from ..weights.module_loader import InHost, check_fit, load_into, slots_of, stream_into
from ..weights.pth_reader import PthReader
from ..weights.quant_layout import SCALE
from ..weights.quantization import scheme_format
from ..weights.vae_names import vae_names
from ..weights.value_check import ValueCheck
from .model_files import ModelFiles

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The device and the dtypes of matrix products: `compute` in the experts and the text encoder, `vae` in the VAE."""

    device: torch.device
    compute: torch.dtype
    vae: torch.dtype

    @classmethod
    def of(cls, config: EngineConfig) -> Precision:
        """The configuration's device and dtypes; "auto" is the best device here, bf16 on a GPU and fp32 on a CPU."""
        device = pick_device(config.device)
        natural = torch.float32
        if device.type == "cuda":
            natural = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        elif device.type == "mps":
            natural = torch.float16
        return cls(
            device=device,
            compute=DTYPES.get(config.dtype, natural),
            vae=DTYPES.get(config.vae_dtype, torch.float32 if natural is torch.float16 else natural),
        )


def pick_device(name: str) -> torch.device:
    """The device called `name`, which must exist here; "auto" is CUDA, else Apple's GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(f'device is "{name}", but this machine has {count} CUDA devices. Use "auto" or "cpu".')
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError('device is "mps", but this machine has none. Use "auto" or "cpu".')
    return device


def load_text_encoder(
    files: ModelFiles,
    config: EngineConfig,
    precision: Precision,
    watch: LoadWatch = UNWATCHED,
    in_host: InHost | None = None,
) -> TextEncoder:
    """The text encoder, quantised while it is read if the configuration wants that and has no prebuilt file."""
    prebuilt = files.prebuilt.t5 if files.prebuilt else None
    quantise = config.t5_quantized and config.build and not prebuilt
    return TextEncoder.load(
        prebuilt or files.t5,
        files.tokenizer,
        dtype=precision.compute,
        device=precision.device,
        text_len=config.text_len,
        quantise=scheme_format(config.t5_quant_scheme) if quantise else None,
        watch=watch,
        in_host=in_host,
    )


def expert_weights(files: ModelFiles, which: Expert, config: EngineConfig) -> ModelWeights:
    """One expert's weights without LoRAs, quantised if the configuration builds them so. Reads headers only."""
    checkpoint = open_checkpoint(files.high if which == "high" else files.low)
    quantise = scheme_format(config.dit_quant_scheme) if config.build == "fp8" else None
    weights = ModelWeights.of_expert(checkpoint, quantise=quantise)
    if config.dit_quantized and not weights.quantised and not weights.layout.scales:
        raise CheckpointError(
            f"dit_quantized is true, but {short_path(checkpoint.path)} holds no quantised weights. "
            f'Name a quantised file in {which}_noise_quantized_ckpt, set build to "fp8" to make one, '
            "or set dit_quantized to false."
        )
    return weights


def prebuilt_weights(files: ModelFiles, which: Expert) -> ModelWeights | None:
    """One expert's weights with the configuration's LoRAs, from the prebuilt file if there is one."""
    if files.prebuilt is None:
        return None
    checkpoint = open_checkpoint(files.prebuilt.high if which == "high" else files.prebuilt.low)
    return ModelWeights.of_expert(checkpoint)


def build_expert(
    files: ModelFiles, weights: ModelWeights, precision: Precision, self_attention: Choice, cross_attention: Choice
) -> WanDiT:
    """One expert on the meta device. Compares the weights with the architecture and reads no tensor."""
    dit_config = DiTConfig.from_checkpoint(files.architecture, weights.plain_shapes)
    with torch.device("meta"):
        dit = WanDiT(dit_config, self_attention=self_attention.fn, cross_attention=cross_attention.fn)
    dit.cast(precision.compute)
    swap_linears(dit, weights.formats, exact=weights.layout.full_precision)
    swap_for_blocks(dit, weights.blocks, dit.blocks)
    check_fit(dit, weights.shapes, weights.dtypes, source_name=weights.source)
    return dit.eval()


def load_expert(
    files: ModelFiles,
    weights: ModelWeights,
    precision: Precision,
    self_attention: Choice,
    cross_attention: Choice,
    watch: LoadWatch = UNWATCHED,
    group: Group = ALONE,
    compute_device: torch.device | None = None,
    in_host: InHost | None = None,
) -> WanDiT:
    """One expert with these weights, on the device of `precision`, or in the memory that `in_host` gives it. Of several
    processes, rank 0 reads for all.

    Adds LoRAs and quantises on `compute_device`, the device that will compute with the weights, even if they go to
    host memory: there it takes seconds, and minutes on a CPU.
    """
    dit = build_expert(files, weights, precision, self_attention, cross_attention)
    dtype_of = expert_dtypes(precision)
    device = compute_device if compute_device is not None and weights.computes else precision.device
    if in_host is not None:
        in_host(dit, dit.blocks, dtype_of)
    slots = slots_of(dit) if in_host is not None and group.size == 1 else {}
    check = ValueCheck(weights.source)
    tensors = weights.tensors(dtype_of=dtype_of, device=device, into=slots.get, look=check.look, watch=watch)
    stream_into(
        dit, group.broadcast_stream(tensors, watch.cancel), dtype_of=dtype_of, device=precision.device, check=check
    )
    return dit


def expert_dtypes(precision: Precision) -> Callable[[str], torch.dtype]:
    """The dtype of an expert's tensor with this name, unless it is quantised."""
    return lambda name: torch.float32 if name.endswith(SCALE) else parameter_dtype(name, precision.compute)


def verify_vae(checkpoint: Checkpoint) -> None:
    """Compare a VAE in PyTorch's format, half a gigabyte, with its checksums: nothing else notices changed bytes."""
    for file in checkpoint.files:
        if isinstance(file, PthReader):
            file.verify()


def load_vae(
    checkpoint: Checkpoint, precision: Precision, group: Group = ALONE, watch: LoadWatch = UNWATCHED
) -> WanVAE:
    """The VAE, without `verify_vae`."""
    names = vae_names(checkpoint.shapes, short_path(checkpoint.path))
    with torch.device("meta"):
        vae = WanVAE(VAEConfig.from_shapes({names[name]: shape for name, shape in checkpoint.shapes.items()}))
    load_into(
        vae,
        checkpoint,
        dtype_of=lambda _: precision.vae,
        device=precision.device,
        names=names,
        transform=group.broadcast_stream,
        watch=replace(watch, cancel=group.local_cancel(watch.cancel)),
    )
    return vae.eval()


@contextmanager
def whole_float32() -> Iterator[None]:
    """A context in which float32 convolutions run in float32. By default CUDA rounds their inputs to 10 bits, and the
    spatial shards of several processes then differ by more than one level. Leaves bf16 alone."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
