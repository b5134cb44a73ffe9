"""One loaded engine: which model, from which files, in which precision, where its weights live. Frozen.

Field names are LightX2V's JSON keys where it has one. Whatever cannot work together is a ConfigError here, before a
single weight is read. Changing an EngineConfig means loading again; everything that does not is in `request.Request`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any, Literal, Self

from ..errors import BadRequest, ConfigError
from .attention_names import check_attention_name
from .checks import Checks, did_you_mean
from .request import TASKS, LoraSpec, Request, Task

check = Checks(ConfigError)

ModelClass = Literal["wan2.2_moe", "wan2.2_moe_distill"]
Auto = Literal["auto"]

MODEL_CLASSES: tuple[ModelClass, ...] = ("wan2.2_moe", "wan2.2_moe_distill")
BASE_REPOS: dict[Task, str] = {
    "t2v": "Wan-AI/Wan2.2-T2V-A14B",
    "i2v": "Wan-AI/Wan2.2-I2V-A14B",
    "flf2v": "Wan-AI/Wan2.2-I2V-A14B",
}
DTYPES = ("auto", "bf16", "fp16", "fp32")
GRANULARITIES = ("model", "block", "phase")
BUILDS = ("merged", "fp8")
QUANT_SCHEMES = (
    *("fp8", "fp8-sgl", "fp8-vllm", "fp8-q8f", "fp8-triton", "fp8-torchao", "fp8-pertensor"),
    *("int8", "int8-sgl", "int8-vllm", "int8-q8f", "int8-triton", "int8-torchao"),
)
"""All fp8 names mean e4m3 with a scale per row or tensor, all int8 names int8 with a scale per row: the files decide.
The part after the dash is LightX2V's kernel; here the best kernel that runs is chosen."""
OTHER_SCHEMES = re.compile(r"(fp8|int8)-(b128-deepgemm|musa|intel-xpu|npu|tmo|mlu)|nvfp4|mxfp[468][\w-]*|gguf-\w+")
"""LightX2V's other formats and kernels: block-scaled, 4-bit, GGUF, other vendors."""
A14B_HEADS = 40

_FILE_KEYS = (
    *("models_dir", "high_noise_original_ckpt", "low_noise_original_ckpt"),
    *("high_noise_quantized_ckpt", "low_noise_quantized_ckpt"),
    *("t5_quantized_ckpt", "t5_original_ckpt", "t5_tokenizer_path", "vae_path"),
)
_FLAG_KEYS = (
    *("dit_quantized", "t5_quantized", "lora_dynamic_apply", "lora_allow_partial"),
    *("attention_strict", "lazy_load"),
)
_AUTO_FLAG_KEYS = ("cpu_offload", "t5_cpu_offload", "vae_cpu_offload", "use_tiling_vae")


_INERT_PARALLEL: dict[str, tuple[Any, ...] | None] = {
    "tensor_p_size": (1,),
    "seq_p_quant_scheme": (None,),
    "seq_p_fp8_comm": (False,),
    "seq_p_fp4_comm": (False,),
    "vae_parallel": None,
    "seq_p_head_parallel": None,
    "seq_p_tensor_fusion": None,
    "seq_p_prepost_backend": None,
    "seq_p_a2a_backend": None,
    "tp_load_mode": None,
}
"""LightX2V's other keys in `parallel`. With values: only those, since others would change the result. None: any value,
since it only chooses how the same result is computed, and that choice is made here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """A mesh of `cfg_p_size` x `seq_p_size` processes: the two guidance branches, and parts of the sequence."""

    cfg_p_size: int = 1
    seq_p_size: int = 1
    seq_p_attn_type: Literal["ulysses"] = "ulysses"

    def __post_init__(self) -> None:
        for key, high in (("cfg_p_size", 2), ("seq_p_size", 1024)):
            check.whole(f"parallel.{key}", getattr(self, key), 1, high)
        if self.seq_p_attn_type != "ulysses":
            check.bad(
                "parallel.seq_p_attn_type", self.seq_p_attn_type, '"ulysses" (ring attention is not supported here)'
            )

    @property
    def world_size(self) -> int:
        return self.cfg_p_size * self.seq_p_size

    @classmethod
    def for_world(cls, world_size: int, *, enable_cfg: bool) -> Self:
        """The layout for this many processes: with guidance a half for each branch, the rest along the sequence."""
        cfg = 2 if enable_cfg and world_size % 2 == 0 else 1
        return cls(cfg_p_size=cfg, seq_p_size=world_size // cfg)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What is loaded and how it runs.

    "auto" leaves a choice to the machine; for `t5_cpu_offload` and `vae_cpu_offload` it follows `cpu_offload`. Paths
    may be absolute, relative to `models_dir`, the working folder or the project, or names on the Hub (`hub_name`).
    `build` says that the experts are made on first use from the base model and its LoRAs: "merged", or then "fp8".
    """

    model_cls: ModelClass = "wan2.2_moe"
    task: Task = "t2v"
    model_path: str = ""
    models_dir: str | None = None
    high_noise_original_ckpt: str | None = None
    low_noise_original_ckpt: str | None = None
    high_noise_quantized_ckpt: str | None = None
    low_noise_quantized_ckpt: str | None = None
    build: Literal["merged", "fp8"] | None = None
    dit_quantized: bool = False
    dit_quant_scheme: str | None = None
    t5_quantized: bool = False
    t5_quant_scheme: str | None = None
    t5_quantized_ckpt: str | None = None
    t5_original_ckpt: str | None = None
    t5_tokenizer_path: str | None = None
    vae_path: str | None = None
    lora_configs: tuple[LoraSpec, ...] = ()
    lora_dynamic_apply: bool = False
    lora_allow_partial: bool = False
    dtype: str = "auto"
    vae_dtype: str = "auto"
    device: str = "auto"
    self_attn_1_type: str = "auto"
    cross_attn_1_type: str = "auto"
    attention_strict: bool = False
    cpu_offload: bool | Auto = "auto"
    offload_granularity: Literal["model", "block", "phase"] = "model"
    t5_cpu_offload: bool | Auto = "auto"
    vae_cpu_offload: bool | Auto = "auto"
    lazy_load: bool = False
    use_tiling_vae: bool | Auto = "auto"
    text_len: int = 512
    max_tokens: int = 151_200
    parallel: ParallelConfig | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        check.one_of("model_cls", self.model_cls, MODEL_CLASSES)
        check.one_of("task", self.task, TASKS)
        put("model_path", _file("model_path", self.model_path) or BASE_REPOS[self.task])
        for key in _FILE_KEYS:
            put(key, _file(key, getattr(self, key)))
        for key in _FLAG_KEYS:
            check.flag(key, getattr(self, key))
        for key in _AUTO_FLAG_KEYS:
            check.one_of(key, getattr(self, key), (True, False, "auto"))
        for key in ("dtype", "vae_dtype"):
            value = getattr(self, key)
            put(key, check.one_of(key, value.lower() if isinstance(value, str) else value, DTYPES))
        for key in ("dit_quant_scheme", "t5_quant_scheme"):
            put(key, _scheme(key, getattr(self, key)))
        for key in ("self_attn_1_type", "cross_attn_1_type"):
            if not isinstance(getattr(self, key), str):
                check.bad(key, getattr(self, key), "the name of an attention backend")
            check_attention_name(getattr(self, key), key)
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            check.bad("device", self.device, '"auto", "cpu", "mps", "cuda" or "cuda:0"')
        check.one_of("offload_granularity", self.offload_granularity, GRANULARITIES)
        check.one_of("build", self.build, (None, *BUILDS))
        for key, high in (("text_len", 4096), ("max_tokens", 2**31)):
            check.whole(key, getattr(self, key), 1, high)
        put("lora_configs", _lora_configs(self.lora_configs))
        put("parallel", _parallel(self.parallel))
        self._check_quantisation()
        self._check_placement()

    def _check_quantisation(self) -> None:
        for part, scheme in (("dit", self.dit_quant_scheme), ("t5", self.t5_quant_scheme)):
            quantized = self.dit_quantized if part == "dit" else self.t5_quantized
            if quantized and not scheme:
                raise ConfigError(
                    f"{part}_quantized is true, but {part}_quant_scheme is missing. Set it, e.g. to fp8-sgl."
                )
            if scheme and not quantized:
                raise ConfigError(
                    f"{part}_quant_scheme is {scheme!r}, but {part}_quantized is false. Set {part}_quantized to true, "
                    f"or remove {part}_quant_scheme."
                )
        files = [key for key in _FILE_KEYS[3:5] if getattr(self, key)]
        if files and not self.dit_quantized:
            raise ConfigError(
                f"{files[0]} is given, but dit_quantized is false. Set dit_quantized to true, or remove it."
            )
        if self.t5_quantized_ckpt and not self.t5_quantized:
            raise ConfigError(
                "t5_quantized_ckpt is given, but t5_quantized is false. Set t5_quantized to true, or remove it."
            )
        if self.build is not None:
            self._check_build(files)
        elif self.lora_configs and self.dit_quantized and not self.lora_dynamic_apply:
            raise ConfigError(
                "LoRAs cannot be merged into quantised weights without loss. Set lora_dynamic_apply to true to apply "
                "them while running, or dit_quantized to false."
            )

    def _check_build(self, quantized_files: Sequence[str]) -> None:
        files = [key for key in _FILE_KEYS[1:3] if getattr(self, key)] + list(quantized_files)
        if files:
            raise ConfigError(f"build is {self.build!r}, so {files[0]} would not be used. Remove one of the two.")
        if self.build == "merged" and not self.lora_configs:
            raise ConfigError('build is "merged", but there are no lora_configs to merge.')
        if (self.build == "fp8") != self.dit_quantized:
            raise ConfigError(f"build is {self.build!r}, so dit_quantized must be {str(self.build == 'fp8').lower()}.")
        if self.build == "fp8" and not str(self.dit_quant_scheme).startswith("fp8"):
            raise ConfigError(f'build is "fp8", but dit_quant_scheme is {self.dit_quant_scheme!r}. Use fp8-sgl.')
        if self.lora_dynamic_apply:
            raise ConfigError("build merges the LoRAs once; lora_dynamic_apply must be false with it.")

    def _check_placement(self) -> None:
        if self.device == "cpu" and self.cpu_offload is True:
            raise ConfigError(
                'cpu_offload is true, but device is "cpu": there is nothing to offload from. Set cpu_offload to false, '
                'or device to "auto".'
            )
        if self.lazy_load and self.cpu_offload is False:
            raise ConfigError(
                "lazy_load reads blocks from disk as they are needed, so it needs cpu_offload true or auto."
            )
        if self.lazy_load and self.lora_configs and not self.lora_dynamic_apply and not self.build:
            raise ConfigError("lazy_load leaves the files as they are, so LoRAs need lora_dynamic_apply true with it.")

    def check_heads(self, heads: int) -> None:
        """Raises ConfigError if Ulysses cannot give every process one of the model's `heads`."""
        size = self.parallel.seq_p_size if self.parallel else 1
        if size > heads:
            raise ConfigError(
                f"parallel.seq_p_size is {size}, but the model has {heads} attention heads, and every process needs "
                f"one. Possible sizes: 1 to {heads}."
            )

    def check_world(self, world_size: int, *, enable_cfg: bool) -> None:
        """Raises ConfigError if the mesh does not fill the `world_size` processes that were started."""
        if self.parallel is None or self.parallel.world_size == world_size:
            return
        wanted = self.parallel
        layouts = (
            ["a preset for one GPU"]
            if world_size == 1
            else [
                f"cfg_p_size {cfg}, seq_p_size {world_size // cfg}"
                for cfg in ((2, 1) if enable_cfg else (1,))
                if world_size % cfg == 0 and world_size // cfg <= A14B_HEADS
            ]
        )
        raise ConfigError(
            f"parallel asks for cfg_p_size {wanted.cfg_p_size} x seq_p_size {wanted.seq_p_size} = {wanted.world_size} "
            f"processes, but {world_size} {'was' if world_size == 1 else 'were'} started. Start it with "
            f"torchrun --nproc_per_node={wanted.world_size}, or use {' or '.join(layouts) or 'another number'}."
        )

    def check_request(self, request: Request) -> None:
        """Raises if this engine cannot make this video: another task, too many tokens."""
        if (self.task == "t2v") != (request.task == "t2v"):
            raise BadRequest(
                f"The request's task is {request.task}, but the engine was loaded for {self.task}. "
                f"Choose a preset for {request.task}."
            )
        request.check_tokens(self.max_tokens)

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON types. `from_json` gives an equal EngineConfig back."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["lora_configs"] = [lora.to_json() for lora in self.lora_configs]
        data["parallel"] = asdict(self.parallel) if self.parallel else None
        return data

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """An EngineConfig from an object with the names of its fields. Anything unknown in it is an error."""
        return cls(**check.known_keys(data, [field.name for field in fields(cls)], "engine configuration"))


def hub_name(path: str) -> tuple[str, str | None] | None:
    """(owner/repo, file or folder in it or None) if `path` could be a name on the Hub, else None.

    Looks at the text alone: a path that exists on this machine is a local one, whatever this says. `encoders/t5/` is
    where the tutorial's download command puts `lightx2v/Encoders`, so that its JSON also works without that download.
    """
    parts = path.removesuffix("/").split("/")
    if parts[:2] == ["encoders", "t5"]:
        parts[:2] = ["lightx2v", "Encoders"]
    if len(parts) < 2 or parts[0] in ("assets", "outputs", "save_results", "models"):
        return None
    if not all(
        re.fullmatch(r"\w[\w.-]{0,95}", name, re.ASCII) and not re.search(r"--|\.\.", name) for name in parts[:2]
    ):
        return None
    if any(part in ("", ".", "..") or "\\" in part for part in parts[2:]):
        return None
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def _file(key: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, PurePath):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        check.bad(key, value, "a path, or a Hub name such as owner/repo")
    return value


def _scheme(key: str, value: Any) -> str | None:
    if value is None or value == "Default":
        return None
    if not isinstance(value, str):
        check.bad(key, value, "the name of a quantisation scheme")
    if value in QUANT_SCHEMES:
        return value
    supported = f"Use one of: {', '.join(QUANT_SCHEMES)}."
    if OTHER_SCHEMES.fullmatch(value):
        raise ConfigError(f"{key}: {value!r} is one of LightX2V's schemes that is not supported here. {supported}")
    raise ConfigError(f"{key}: there is no scheme {value[:80]!r}. {did_you_mean(value, QUANT_SCHEMES)} {supported}")


def _lora_configs(value: Any) -> tuple[LoraSpec, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        check.bad(
            "lora_configs",
            value,
            'a list of objects such as {"name": "high_noise_model", "path": "…", "strength": 1.0}',
        )
    try:
        return tuple(lora if isinstance(lora, LoraSpec) else LoraSpec.from_json(lora) for lora in value)
    except BadRequest as error:
        raise ConfigError(f"lora_configs: {error}") from None


def _parallel(value: Any) -> ParallelConfig | None:
    if value is None or value is False or isinstance(value, ParallelConfig):
        return value or None
    if not isinstance(value, Mapping):
        check.bad("parallel", value, 'false or an object such as {"cfg_p_size": 2, "seq_p_size": 4}')
    data = dict(value)
    for key, inert in _INERT_PARALLEL.items():
        if key in data and inert is not None and data[key] not in inert:
            check.bad(f"parallel.{key}", data[key], f"nothing else than {inert[0]!r}: it is not supported here")
        data.pop(key, None)
    return ParallelConfig(**check.known_keys(data, [field.name for field in fields(ParallelConfig)], "parallel"))
