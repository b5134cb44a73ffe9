"""The keys of preset files: LightX2V's JSON keys, and the field of Request or EngineConfig that each one fills.

Every key that LightX2V reads for wan2.2_moe is in one of the tables below, so that no key is skipped in silence: it
fills a field, or it is accepted because it cannot change the result, or it is an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError, quoted
from .attention_names import check_attention_name
from .checks import Checks, did_you_mean
from .engine_config import EngineConfig
from .request import Request
from .request_settings import SETTINGS, SHOWN

PER_VIDEO = frozenset(SHOWN)
"""Fields of Request that say what a video shows. A preset file has none of them."""

REQUEST_FIELDS = frozenset(item.name for item in fields(Request)) - PER_VIDEO
ENGINE_FIELDS = frozenset(item.name for item in fields(EngineConfig))

ALIASES = {alias: row.name for row in SETTINGS.values() for alias in row.aliases}
"""LightX2V's names in JSON and Python, and those of diffusers, for fields that have shorter names here."""

INERT: dict[str, tuple[Any, ...]] = {
    "changing_resolution": (False,),
    "do_mm_calib": (False,),
    "dummy_model": (False,),
    "magcache_calibration": (False,),
    "max_area": (False,),
    "patch_size": ([1, 2, 2],),
    "t5_lazy_load": (False,),
    "unload_modules": (False,),
    "use_bfloat16": (True,),
    "use_compile": (False,),
    "use_image_encoder": (False,),
    "use_lightvae": (False,),
    "use_prompt_enhancer": (False,),
    "use_tae": (False,),
    "vae_name": ("Wan2.1_VAE.pth",),
    "vae_stride": ([4, 8, 8],),
    "video_super_resolution": (None, {}),
    "weight_auto_quant": (False,),
}
"""Keys of features that this engine lacks, and the accepted values: those that leave the feature off."""

WITHOUT_EFFECT = frozenset(
    """
    rope_type rope_chunk rope_chunk_size rms_norm_type layer_norm_type modulate_type tp_rms_norm_type
    clean_cuda_cache empty_cache_min_free_gib empty_cache_min_reclaimable_gib num_disk_workers load_from_rank0
    enable_reuse use_stream_vae clip_cpu_offload clip_quantized clip_quant_scheme cfg_parallel seq_parallel
    teacache_thresh coefficients use_ret_steps resolution_rate changing_resolution_steps need_scaled
    """.split()
)
"""Keys that choose among LightX2V's ways to the same result, or that belong to a key of INERT. Any value is accepted,
with a warning. (`enable_reuse` saves an encoding. `use_stream_vae`: the decoder always streams.)"""

NOT_HERE = {
    "dit_original_ckpt": "It is one model for both experts. Use {high,low}_noise_original_ckpt.",
    "dit_quantized_ckpt": "It is one model for both experts. Use {high,low}_noise_quantized_ckpt.",
    "vae_weight_dtype": "Use vae_dtype.",
    "tae_path": "The VAE of the model decodes.",
    **dict.fromkeys(
        ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads", "num_layers", "eps", "model_type"),
        "The architecture is read from the checkpoint.",
    ),
    **dict.fromkeys(
        ("resolution", "bucket_shape", "fixed_area", "fixed_shape"), "Use target_height, target_width and resize_mode."
    ),
    "sub_servers": "Improve the prompt before you send it.",
}
"""LightX2V's keys that change the result with every value, and the advice for each."""

ADVICE = {
    "magcache_calibration": "python -m lightx2v.calibrate makes the table.",
    "use_image_encoder": "Wan2.2-A14B has no image encoder.",
    "use_tae": "The VAE of the model decodes.",
    "use_lightvae": "The VAE of the model decodes.",
    "t5_lazy_load": "Use lazy_load.",
    "unload_modules": "Use cpu_offload or lazy_load.",
    "vae_name": "Use vae_path.",
    "use_bfloat16": "Use dtype.",
}

check = Checks(ConfigError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The content of a flat object, by field. `spelled` maps each field to its key in the object."""

    engine: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    spelled: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def sort_keys(data: Mapping[str, Any], where: str) -> Keys:
    """Sort the keys of `data` by field. An unknown key is a ConfigError that begins with `where`."""
    keys = Keys()
    for key, value in data.items():
        if key == "target_shape":
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise ConfigError(f"{where}: target_shape is {quoted(value)}; expected [height, width].")
            _put(keys, key, "height", value[0], where)
            _put(keys, key, "width", value[1], where)
        elif key == "attn_mode":
            _put(keys, key, "self_attn_1_type", value, where)
            _put(keys, key, "cross_attn_1_type", value, where)
        elif key == "video_frame_interpolation":
            for name, item in _interpolation(value, where, keys).items():
                _put(keys, key, name, item, where)
        elif key in PER_VIDEO or key == "preset":
            raise ConfigError(f"{where}: {key} cannot be set here; it belongs to the request, not to a preset.")
        elif key in ALIASES or key in REQUEST_FIELDS or key in ENGINE_FIELDS:
            _put(keys, key, ALIASES[key] if key in ALIASES else key, value, where)
        else:
            if warning := _without_field(key, value, where):
                keys.warnings.append(warning)
    return keys


def _put(keys: Keys, key: str, name: str, value: Any, where: str) -> None:
    if name in keys.spelled:
        raise ConfigError(f"{where}: {keys.spelled[name]} and {key} both set {name}. Keep one of them.")
    keys.spelled[name] = key
    if name in REQUEST_FIELDS:
        keys.request[name] = value
    if name in ENGINE_FIELDS:
        keys.engine[name] = value


def _interpolation(value: Any, where: str, keys: Keys) -> dict[str, Any]:
    """The fields of LightX2V's object; none where it is empty."""
    if value is None or value == {}:
        return {}
    here = f"{where}: video_frame_interpolation"
    found = check.known_keys(value, ("algo", "target_fps", "model_path"), here)
    if "target_fps" not in found:
        raise ConfigError(f'{here} has no target_fps. Write for example {{"algo": "rife", "target_fps": 32}}.')
    if "algo" in found and found["algo"] != "rife":
        check.bad(f"{here}.algo", found["algo"], '"rife"; for another way set interpolated_fps and interpolation')
    if "model_path" in found:
        keys.warnings.append(f"{here}.model_path has no effect here: the weights are those of RIFE 4.25 from the Hub.")
    return {"interpolated_fps": found["target_fps"], "interpolation": "rife"}


def _without_field(key: str, value: Any, where: str) -> str | None:
    """A warning about a key that fills no field, or None if it is harmless. ConfigError if it changes the result."""
    if key == "cross_attn_2_type":
        # Every file of the tutorial has it: attention to CLIP image tokens, a layer that Wan2.2-A14B lacks.
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {key} is {quoted(value)}; expected the name of an attention backend.")
        check_attention_name(value, f"{where}: {key}")
        return None
    if key in INERT:
        if not any(value == inert and type(value) is type(inert) for inert in INERT[key]):
            advice = f" {ADVICE[key]}" if key in ADVICE else ""
            raise ConfigError(f"{where}: {key} = {quoted(value)} is not supported here. Remove the key.{advice}")
        return None
    if key in WITHOUT_EFFECT:
        return f"{where}: {key} has no effect here; the result is the same without it."
    if key in NOT_HERE:
        raise ConfigError(f"{where}: {key} is not supported here. {NOT_HERE[key]}")
    if key.endswith("_attn_setting"):
        raise ConfigError(f"{where}: {key} is not supported here: it belongs to a sparse attention. Remove the key.")
    raise ConfigError(f"{where}: unknown key {quoted(key)}. {did_you_mean(key, KNOWN)}")


KNOWN = sorted(
    {
        *REQUEST_FIELDS,
        *ENGINE_FIELDS,
        *ALIASES,
        *INERT,
        *WITHOUT_EFFECT,
        "cross_attn_2_type",
        "target_shape",
        "attn_mode",
        "video_frame_interpolation",
    }
)
