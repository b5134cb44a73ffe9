"""EngineConfig: the model to load, its files, its precision and the place of its weights.

A changed EngineConfig means loading again; settings that need no loading are in `request.Request`. Field names are
LightX2V's JSON keys where it has one. Values that cannot work together raise ConfigError, before any weight is read.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any, Literal, Self, get_args, get_type_hints

from ..errors import BadRequest, ConfigError, quoted
from .attention_names import check_attention_name
from .checks import Checks, allowed_values, did_you_mean
from .gguf_formats import MIXES
from .lora_spec import LoraSpec
from .request import Request, Task
from .sol_attn_setting import SolAttnSetting

check = Checks(ConfigError)

ModelClass = Literal["wan2.2_moe", "wan2.2_moe_distill"]
DType = Literal["auto", "bf16", "fp16", "fp32"]
Auto = Literal["auto"]

MODEL_CLASSES: tuple[ModelClass, ...] = get_args(ModelClass)
BASE_REPOS: dict[Task, str] = {
    "t2v": "Wan-AI/Wan2.2-T2V-A14B",
    "i2v": "Wan-AI/Wan2.2-I2V-A14B",
    "flf2v": "Wan-AI/Wan2.2-I2V-A14B",
}
QUANT_SCHEMES = (
    *("fp8", "fp8-sgl", "fp8-vllm", "fp8-q8f", "fp8-triton", "fp8-torchao", "fp8-pertensor"),
    *("int8", "int8-sgl", "int8-vllm", "int8-q8f", "int8-triton", "int8-torchao"),
)
"""All fp8 names mean e4m3 with a scale per row or tensor, all int8 names int8 with a scale per row; the files decide.
The part after the dash names a kernel of LightX2V. This engine takes the best kernel that runs."""
GGUF_SCHEMES = tuple(f"gguf-{mix}" for mix in MIXES)
"""LightX2V's names for GGUF files, and the same for its other mixes. The file decides the format of each weight."""
OTHER_SCHEMES = re.compile(r"(fp8|int8)-(b128-deepgemm|musa|intel-xpu|npu|tmo|mlu)|nvfp4|mxfp[468][\w-]*|gguf-\w+")
"""LightX2V's other formats and kernels: block-scaled, 4-bit, other vendors."""
A14B_HEADS = 40

VRAM_GB = (2.0, 1024.0)
"""The least and the most of `vram_gb`."""

_ORIGINALS = ("high_noise_original_ckpt", "low_noise_original_ckpt")
_QUANTIZED = ("high_noise_quantized_ckpt", "low_noise_quantized_ckpt")
_T5_FILES = ("t5_quantized_ckpt", "t5_original_ckpt", "t5_tokenizer_path")
FILE_KEYS = ("models_dir", *_ORIGINALS, *_QUANTIZED, *_T5_FILES, "vae_path")

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
"""LightX2V's other keys in `parallel`, and the values that are accepted. Another value would change the result. None
accepts any value: the key only chooses among ways to compute the same result."""


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
    """The settings of one loaded engine.

    "auto" lets the program choose for this machine; for `t5_cpu_offload` and `vae_cpu_offload` it means the value of
    `cpu_offload`. A path is absolute, relative to `models_dir`, the working folder or the project, or a name on the Hub
    (`hub_name`). `vram_gb` limits what the program takes of the device, as a card of so many GB does. With `build`, the
    first use makes the experts from the base model and its LoRAs: "merged", or "fp8", which is merged and then
    quantised.
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
    dtype: DType = "auto"
    vae_dtype: DType = "auto"
    device: str = "auto"
    self_attn_1_type: str = "auto"
    cross_attn_1_type: str = "auto"
    attention_strict: bool = False
    sol_attn_setting: SolAttnSetting | None = None
    cpu_offload: bool | Auto = "auto"
    offload_granularity: Literal["model", "block", "phase"] = "model"
    t5_cpu_offload: bool | Auto = "auto"
    vae_cpu_offload: bool | Auto = "auto"
    lazy_load: bool = False
    vram_gb: float | None = None
    use_tiling_vae: bool | Auto = "auto"
    text_len: int = 512
    max_tokens: int = 151_200
    parallel: ParallelConfig | None = None

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for key in ("dtype", "vae_dtype"):
            if isinstance(getattr(self, key), str):
                put(key, getattr(self, key).lower())
        for key, allowed in _ALLOWED.items():
            check.one_of(key, getattr(self, key), allowed)
        put("model_path", _file("model_path", self.model_path) or BASE_REPOS[self.task])
        for key in FILE_KEYS:
            put(key, _file(key, getattr(self, key)))
        for key in ("dit_quant_scheme", "t5_quant_scheme"):
            put(key, _scheme(key, getattr(self, key)))
        for key in ("self_attn_1_type", "cross_attn_1_type"):
            if not isinstance(getattr(self, key), str):
                check.bad(key, getattr(self, key), "the name of an attention backend")
            check_attention_name(getattr(self, key), key)
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", self.device):
            check.bad("device", self.device, '"auto", "cpu", "mps", "cuda" or "cuda:0"')
        for key, high in (("text_len", 4096), ("max_tokens", 2**31)):
            check.whole(key, getattr(self, key), 1, high)
        if self.sol_attn_setting is not None and not isinstance(self.sol_attn_setting, SolAttnSetting):
            put("sol_attn_setting", SolAttnSetting.from_json(self.sol_attn_setting))
        put("lora_configs", _lora_configs(self.lora_configs))
        put("parallel", _parallel(self.parallel))
        self._check_quantisation()
        self._check_placement()

    def _check_quantisation(self) -> None:
        quantized_files = [key for key in _QUANTIZED if getattr(self, key)]
        for part, quantized, scheme, files in (
            ("dit", self.dit_quantized, self.dit_quant_scheme, quantized_files),
            ("t5", self.t5_quantized, self.t5_quant_scheme, ["t5_quantized_ckpt"] if self.t5_quantized_ckpt else []),
        ):
            if quantized and not scheme:
                raise ConfigError(
                    f"{part}_quantized is true, but {part}_quant_scheme is missing. Set it, e.g. to fp8-sgl."
                )
            for key, value in ((f"{part}_quant_scheme", scheme), *((file, True) for file in files)):
                if value and not quantized:
                    got = "given" if value is True else repr(value)
                    raise ConfigError(
                        f"{key} is {got}, but {part}_quantized is false. Set {part}_quantized to true, or remove {key}."
                    )
        if self.t5_quant_scheme in GGUF_SCHEMES and not (self.t5_quantized_ckpt or self.t5_original_ckpt):
            raise ConfigError(f"t5_quant_scheme is {self.t5_quant_scheme}. Name the GGUF file in t5_quantized_ckpt.")
        if self.build is not None:
            self._check_build(quantized_files)
        elif self._needs_dynamic_loras and not self.lora_dynamic_apply:
            raise ConfigError(
                "LoRAs cannot be merged into quantised weights without loss. Set lora_dynamic_apply to true to apply "
                "them during the run, or dit_quantized to false."
            )

    @property
    def _needs_dynamic_loras(self) -> bool:
        """GGUF weights take LoRAs whenever they are dequantised, without loss."""
        return bool(self.lora_configs) and self.dit_quantized and self.dit_quant_scheme not in GGUF_SCHEMES

    def _check_build(self, quantized_files: Sequence[str]) -> None:
        build, scheme = self.build, self.dit_quant_scheme
        files = [key for key in _ORIGINALS if getattr(self, key)] + list(quantized_files)
        if files:
            raise ConfigError(f"build is {build!r}, so {files[0]} would not be used. Remove one of the two.")
        if build == "merged" and not self.lora_configs:
            raise ConfigError('build is "merged", but there are no lora_configs to merge. Add them, or remove build.')
        if (build == "fp8") != self.dit_quantized:
            raise ConfigError(
                f"build is {build!r}, but dit_quantized is {str(self.dit_quantized).lower()}. "
                f"Set it to {str(build == 'fp8').lower()}, or change build."
            )
        if build == "fp8" and not str(scheme).startswith("fp8"):
            raise ConfigError(f'build is "fp8", but dit_quant_scheme is {scheme!r}. Use fp8-sgl.')
        if self.lora_dynamic_apply:
            raise ConfigError("build merges the LoRAs once, so lora_dynamic_apply must be false with it.")
        if any(lora.varies for lora in self.lora_configs):
            raise ConfigError("build merges the LoRAs once, so each has one strength. Give one, or remove build.")

    def _check_placement(self) -> None:
        if self.vram_gb is not None:
            object.__setattr__(self, "vram_gb", check.real("vram_gb", self.vram_gb, *VRAM_GB))
        if self.device == "cpu" and self.cpu_offload is True:
            raise ConfigError(
                'cpu_offload is true, but device is "cpu": there is nothing to offload from. Set cpu_offload to false, '
                'or device to "auto".'
            )
        if self.lazy_load and self.cpu_offload is False:
            raise ConfigError("lazy_load reads blocks from disk during the run, so it needs cpu_offload true or auto.")
        if self.lazy_load and self.lora_configs and not self.lora_dynamic_apply and not self.build:
            raise ConfigError("lazy_load does not change the files, so LoRAs need lora_dynamic_apply true with it.")

    def check_heads(self, heads: int) -> None:
        """Raise ConfigError if Ulysses cannot give every process one of the model's `heads`."""
        size = self.parallel.seq_p_size if self.parallel else 1
        if size > heads:
            raise ConfigError(
                f"parallel.seq_p_size is {size}, but the model has {heads} attention heads, and every process needs "
                f"one. Possible sizes: 1 to {heads}."
            )

    def check_world(self, world_size: int, *, enable_cfg: bool) -> None:
        """Raise ConfigError if the mesh does not fill the `world_size` processes of torchrun."""
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
        """Raise BadRequest if this engine cannot make this video: another task, too many tokens, or strengths of its
        LoRAs for another number of phases."""
        if (self.task == "t2v") != (request.task == "t2v"):
            raise BadRequest(
                f"The request's task is {request.task}, but the engine was loaded for {self.task}. "
                f"Choose a preset for {request.task}."
            )
        request.check_tokens(self.max_tokens)
        request.check_strengths(self.lora_configs if request.loras is None else request.loras)

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON types. `from_json` returns an equal EngineConfig."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        data["lora_configs"] = [lora.to_json() for lora in self.lora_configs]
        data["sol_attn_setting"] = self.sol_attn_setting.to_json() if self.sol_attn_setting else None
        data["parallel"] = asdict(self.parallel) if self.parallel else None
        return data

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """An EngineConfig from an object with the names of its fields. An unknown key is an error."""
        return cls(**check.known_keys(data, [field.name for field in fields(cls)], "engine configuration"))


_ALLOWED = {key: allowed for key, hint in get_type_hints(EngineConfig).items() if (allowed := allowed_values(hint))}
"""{field: its values}, for the fields that are a bool or a choice of names."""


def hub_name(path: str) -> tuple[str, str | None] | None:
    """(owner/repo, file or folder in it or None) if `path` can be a name on the Hub, else None.

    This reads the text only: a path that exists on this machine is local anyway. The tutorial's download command puts
    `lightx2v/Encoders` into `encoders/t5/`; its JSON works without that download too.
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
    if value in (*QUANT_SCHEMES, *GGUF_SCHEMES):
        return value
    supported = f"Use one of: {', '.join(QUANT_SCHEMES)}; for a GGUF file its mix, such as gguf-Q4_K_M."
    if OTHER_SCHEMES.fullmatch(value):
        raise ConfigError(f"{key}: {value!r} is one of LightX2V's schemes that is not supported here. {supported}")
    raise ConfigError(
        f"{key}: there is no scheme {quoted(value)}. {did_you_mean(value, (*QUANT_SCHEMES, *GGUF_SCHEMES))} {supported}"
    )


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
