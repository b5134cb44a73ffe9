"""Models of any size with random weights, made on the device, and an engine with them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v.attention import Choice, resolve_attention
from lightx2v.config.engine_config import EngineConfig
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.phases import Expert
from lightx2v.engine.engine import LoadedEngine
from lightx2v.loading.expert_loras import AppliedLora
from lightx2v.loading.networks import Precision
from lightx2v.models.dit import DiTConfig, WanDiT, parameter_dtype
from lightx2v.models.preview import Preview
from lightx2v.models.quant_linear import QuantLinear, swap_linears
from lightx2v.models.umt5 import TextEncoder, build_stack, load_tokenizer
from lightx2v.models.vae import WanVAE
from lightx2v.offload.packed_weights import PackedModule, Reader
from lightx2v.parallel.mesh import Mesh
from lightx2v.parallel.single_process import ALONE
from lightx2v.weights.quant_layout import is_expert_matrix
from lightx2v.weights.quantization import quantise

from .bench import Bench

FP8 = torch.float8_e4m3fn


def attention(bench: Bench) -> Choice:
    return resolve_attention("auto", bench.device, bench.compute, head_dim=bench.sizes.dit.head_dim)


def expert(bench: Bench, config: DiTConfig, *, fp8: bool = False, seed: int = 0) -> WanDiT:
    """An expert on the device, in the dtypes of a run."""
    torch.manual_seed(seed)
    best = attention(bench).fn
    with torch.device("meta"):
        dit = WanDiT(config, self_attention=best, cross_attention=best)
    names = {name: tuple(parameter.shape) for name, parameter in dit.named_parameters()}
    if fp8:
        swap_linears(dit, {name: FP8 for name, shape in names.items() if is_expert_matrix(name, shape)})
    for name, shape in names.items():
        path, _, leaf = name.rpartition(".")
        owner = dit.get_submodule(path)
        values = _values(name, shape, parameter_dtype(name, bench.compute), bench.device)
        if isinstance(owner, QuantLinear) and leaf == "weight":
            values, scale = quantise(values, FP8)
            owner.weight_scale = nn.Parameter(scale, requires_grad=False)
        setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
    return dit.eval()


def _values(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.empty(shape, dtype=dtype, device=device)
    if "norm" in name and name.endswith("weight"):
        return values.fill_(1)
    return values.normal_(0, 0.1 if len(shape) == 1 else values[0].numel() ** -0.5)


def vae(bench: Bench) -> WanVAE:
    torch.manual_seed(0)
    with torch.device(bench.device):
        made = WanVAE(bench.sizes.vae)
    return made.to(bench.compute).eval().requires_grad_(False)


def text_encoder(bench: Bench) -> TextEncoder:
    """A text encoder with a tokenizer of a few hundred tokens and a table for these only: the table is looked up, not
    computed."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = write_tokenizer(Path(folder))
        tokenizer = load_tokenizer(folder)
    sizes = replace(bench.sizes.text, vocab=vocabulary)
    stack = build_stack(sizes).to_empty(device=bench.device).to(bench.compute)
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    table_VD = torch.randn(vocabulary, sizes.width).to(bench.compute)
    return TextEncoder(stack, table_VD, tokenizer, text_len=bench.sizes.dit.text_len)


def write_tokenizer(folder: Path) -> int:
    """Write a Unigram tokenizer for letters and bytes; return its number of tokens."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import Unigram

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{byte:02X}>", -12.0) for byte in range(256))]
    vocabulary += [(letter, -4.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


class Model:
    """All parts on the device, like `offload.resident.Resident` but without files."""

    tiling = None
    plan: dict[str, Any] | None = None
    reads_together = False
    has_text = True
    readers: dict[Expert, Reader] = {}
    packed: dict[str, PackedModule] = {}
    loras: tuple[AppliedLora, ...] = ()

    def __init__(self, bench: Bench, task: str, *, fp8: bool = False) -> None:
        config = bench.sizes.dit if task == "t2v" else replace(bench.sizes.dit, in_dim=bench.sizes.in_dim_i2v)
        self._experts = {name: expert(bench, config, fp8=fp8, seed=n) for n, name in enumerate(("high", "low"))}
        self._vae, self._text = vae(bench), text_encoder(bench)

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        yield self._text

    @contextmanager
    def expert(self, which: Expert, *args: object, **more: object) -> Iterator[WanDiT]:
        yield self._experts[which]

    @contextmanager
    def vae(self) -> Iterator[WanVAE]:
        yield self._vae

    def prepare(self, need: object) -> None:
        """Do nothing: no weights move."""

    def reduce_memory(self, stage: object) -> None:
        """Do nothing: there is nothing to offload."""

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        assert not specs, "random weights take no LoRAs"

    def close(self) -> None:
        self._experts.clear()
        del self._vae, self._text


def engine(bench: Bench, placement: Any, task: str) -> LoadedEngine:
    """An engine with these parts."""
    best = attention(bench)
    return LoadedEngine(
        config=EngineConfig(model_cls="wan2.2_moe_distill", task=task, device=bench.device.type),  # type: ignore[arg-type]
        mesh=Mesh(ALONE, 1, 1),
        precision=Precision(device=bench.device, compute=bench.compute, vae=bench.compute),
        placement=placement,
        self_attention=best,
        cross_attention=best,
        preview=Preview(torch.zeros(17, 3)),
        load_seconds=0.0,
    )
