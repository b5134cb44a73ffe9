"""The names of the attention backends. They are here, without torch, so that a preset is checked before torch loads."""

from ..errors import ConfigError, quoted
from .checks import did_you_mean

SUPPORTED = (
    *("auto", "auto_fast", "torch_sdpa", "cudnn", "flash_attn2", "flash_attn3", "flash_attn4"),
    *("flash_attn3_fp8", "int8_kitchen", "sage_attn2", "sage_attn3", "sol_attn"),
)
FOR_VIDEO_ONLY = frozenset({"auto_fast", "flash_attn3_fp8", "int8_kitchen", "sol_attn"})
"""They trade exactness for speed with many keys. A prompt has few keys: its attention then takes what `auto` takes."""

NOT_SUPPORTED = frozenset(
    """
    nbhd_attn nbhd_attn_flashinfer radial_attn svg_attn svg2_attn draft_attn dynamic_sparse_attn general_sparse_attn
    sparge_attn spas_sage_attn2 spas_sage_attn3 spas_flash_attn4 rainfusion_attn flex_attn sla_attn
    sage_attn2_k_int8_v_fp8 npu_flash_attn npu_attn mlu_sage_attn mlu_flash_attn intel_xpu_flash_attn
    """.split()
)
"""LightX2V's other names: more sparse, neighbourhood and vendor kernels. They change the result or need other hardware.
"""


def check_attention_name(name: str, key: str = "attention") -> None:
    """Raises ConfigError unless `name` is in SUPPORTED. `key` is the setting that holds the name."""
    if name in SUPPORTED:
        return
    why = f"there is no attention backend {quoted(name)}. {did_you_mean(str(name), SUPPORTED)}"
    if name in NOT_SUPPORTED:
        why = f"{name!r} is one of LightX2V's kernels that is not supported here."
    raise ConfigError(f"{key}: {why} Use one of: {', '.join(SUPPORTED)}.")
