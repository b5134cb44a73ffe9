from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from junk import JUNK

from lightx2v.config.engine_config import GGUF_SCHEMES, QUANT_SCHEMES, EngineConfig, ParallelConfig, hub_name
from lightx2v.config.lora_spec import LoraSpec
from lightx2v.config.request import Request
from lightx2v.errors import BadRequest, ConfigError

LORAS = (LoraSpec(expert="high", path="h.safetensors"), LoraSpec(expert="low", path="l.safetensors"))
FP8 = {"dit_quantized": True, "dit_quant_scheme": "fp8-sgl"}


def refused(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**values)  # type: ignore[arg-type]
    return str(caught.value)


def test_no_model_path_means_the_official_one_of_the_task() -> None:
    assert EngineConfig().model_path == "Wan-AI/Wan2.2-T2V-A14B"
    assert EngineConfig(task="flf2v").model_path == "Wan-AI/Wan2.2-I2V-A14B"
    assert EngineConfig(model_path=Path("a/b")).model_path == "a/b"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_cls": "wan2.1"}, "model_cls is 'wan2.1'; expected wan2.2_moe or wan2.2_moe_distill"),
        ({"task": "t2i"}, "task is 't2i'"),
        ({"model_path": 3}, "model_path is 3"),
        ({"vae_path": "a\0b"}, "vae_path is"),
        ({"dit_quantized": 1}, "dit_quantized is 1; expected true or false"),
        ({"cpu_offload": "yes"}, "cpu_offload is 'yes'; expected true, false or auto"),
        ({"cpu_offload": None}, "cpu_offload is None"),
        ({"dtype": "int8"}, "expected auto, bf16, fp16 or fp32"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"device": 0}, "device is 0"),
        ({"offload_granularity": "layer"}, "expected model, block or phase"),
        ({"text_len": 0}, "text_len is 0"),
        ({"text_len": True}, "text_len is True"),
        ({"max_tokens": "many"}, "max_tokens is 'many'"),
        ({"build": "int4"}, "expected merged, fp8 or null"),
        ({"lora_configs": {"path": "a"}}, "expected a list"),
        ({"lora_configs": [{"name": "middle", "path": "a"}]}, "lora_configs: LoRA name is 'middle'"),
        ({"self_attn_1_type": "flash_atn2"}, "Did you mean 'flash_attn2'?"),
        ({"self_attn_1_type": "radial_attn"}, "not supported here"),
        ({"cross_attn_1_type": None}, "cross_attn_1_type is None"),
        ({"parallel": True}, "parallel is True"),
        ({"parallel": {"cfg_p_size": 3}}, "whole number from 1 to 2"),
        ({"parallel": {"seq_p_size": True}}, "seq_p_size is True"),
        ({"parallel": {"seq_p_attn_type": "ring"}}, "ring attention is not supported here"),
        ({"parallel": {"tensor_p_size": 4}}, "tensor_p_size is 4"),
        ({"parallel": {"seq_p_sise": 4}}, "Did you mean 'seq_p_size'"),
        ({"parallel": {"seq_p_fp8_comm": True}}, "not supported here"),
        ({"lora_configs": [10**5000]}, "huge number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, object], message: str) -> None:
    assert message in refused(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dit_quantized": True}, "dit_quant_scheme is missing"),
        ({"dit_quant_scheme": "fp8-sgl"}, "Set dit_quantized to true"),
        ({"t5_quantized": True}, "t5_quant_scheme is missing"),
        ({"t5_quant_scheme": "int8"}, "Set t5_quantized to true"),
        ({"t5_quantized_ckpt": "t5.pth"}, "t5_quantized is false"),
        ({"high_noise_quantized_ckpt": "h.safetensors"}, "dit_quantized is false"),
        ({**FP8, "lora_configs": LORAS}, "Set lora_dynamic_apply to true"),
        ({"lazy_load": True, "cpu_offload": False}, "needs cpu_offload"),
        ({"lazy_load": True, "lora_configs": LORAS}, "need lora_dynamic_apply true"),
        ({"device": "cpu", "cpu_offload": True}, "nothing to offload from"),
        ({"build": "merged"}, "no lora_configs to merge"),
        ({"build": "merged", "lora_configs": LORAS, **FP8}, "but dit_quantized is true. Set it to false"),
        ({"build": "fp8", "lora_configs": LORAS}, "but dit_quantized is false. Set it to true"),
        ({"build": "fp8", "dit_quantized": True, "dit_quant_scheme": "int8-sgl"}, "Use fp8-sgl"),
        ({"build": "fp8", **FP8, "lora_configs": LORAS, "lora_dynamic_apply": True}, "must be false with it"),
        ({"build": "merged", "lora_configs": LORAS, "low_noise_original_ckpt": "a"}, "would not be used"),
        ({"build": "fp8", **FP8, "high_noise_quantized_ckpt": "a"}, "would not be used"),
    ],
)
def test_an_impossible_mix_is_refused_before_loading(values: dict[str, object], message: str) -> None:
    assert message in refused(**values)


@pytest.mark.parametrize(
    "values",
    [
        {**FP8, "lora_configs": LORAS, "lora_dynamic_apply": True},
        {"lazy_load": True},
        {"device": "auto", "cpu_offload": True, "offload_granularity": "block"},
        {"device": "cuda:3", "cpu_offload": True},
        {"build": "merged", "lora_configs": LORAS},
        {"build": "fp8", "lora_configs": LORAS, **FP8},
        {"low_noise_original_ckpt": "a"},
    ],
)
def test_a_possible_mix_is_accepted(values: dict[str, object]) -> None:
    EngineConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", [*QUANT_SCHEMES, *GGUF_SCHEMES])
def test_schemes_whose_files_we_read_are_accepted(scheme: str) -> None:
    assert EngineConfig(dit_quantized=True, dit_quant_scheme=scheme).dit_quant_scheme == scheme


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp6-mxfp8", "gguf-IQ2_XS", "int8-npu", "fp8-b128-deepgemm"])
def test_lightx2vs_other_schemes_are_named_as_not_supported(scheme: str) -> None:
    assert "not supported here" in refused(dit_quantized=True, dit_quant_scheme=scheme)


def test_lightx2vs_gguf_schemes_are_known() -> None:
    names = "BF16 Q8_0 Q6_K Q5_K_S Q5_K_M Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 Q3_K_M Q3_K_S"
    assert {f"gguf-{name}" for name in names.split()} <= set(GGUF_SCHEMES)


def test_gguf_weights_take_loras_and_an_encoder_of_theirs_has_a_file() -> None:
    gguf = {"dit_quantized": True, "dit_quant_scheme": "gguf-Q4_K_M"}
    assert EngineConfig(lora_configs=LORAS, **gguf).lora_configs  # type: ignore[arg-type]
    assert "lora_dynamic_apply" in refused(lora_configs=LORAS, **FP8)
    t5 = {"t5_quantized": True, "t5_quant_scheme": "gguf-Q8_0"}
    assert "t5_quantized_ckpt" in refused(**t5)
    assert EngineConfig(t5_quantized_ckpt="umt5.gguf", **t5).t5_quantized  # type: ignore[arg-type]


def test_lightx2vs_spellings_are_understood() -> None:
    assert EngineConfig(dit_quant_scheme="Default").dit_quant_scheme is None
    assert EngineConfig(vae_dtype="BF16").vae_dtype == "bf16"
    assert EngineConfig(parallel=False).parallel is None  # type: ignore[arg-type]
    parallel = EngineConfig(parallel={"seq_p_size": 4, "vae_parallel": True, "tensor_p_size": 1}).parallel  # type: ignore[arg-type]
    assert parallel == ParallelConfig(seq_p_size=4)
    assert "Did you mean 'fp8-sgl'" in refused(dit_quantized=True, dit_quant_scheme="fp8-sgi")


@pytest.mark.parametrize("size", [1, 2, 3, 8, 40])
def test_ulysses_gives_every_process_a_head(size: int) -> None:
    EngineConfig(parallel=ParallelConfig(seq_p_size=size)).check_heads(40)


@pytest.mark.parametrize("size", [41, 80])
def test_larger_ulysses_sizes_are_refused_with_the_possible_ones(size: int) -> None:
    with pytest.raises(ConfigError, match=r"Possible sizes: 1 to 40\."):
        EngineConfig(parallel=ParallelConfig(seq_p_size=size)).check_heads(40)


def test_guidance_gets_its_half_of_the_processes() -> None:
    layouts = {(n, cfg): ParallelConfig.for_world(n, enable_cfg=cfg) for n in (2, 3, 8) for cfg in (True, False)}
    assert {key: (layout.cfg_p_size, layout.seq_p_size) for key, layout in layouts.items()} == {
        (2, True): (2, 1),
        (2, False): (1, 2),
        (3, True): (1, 3),
        (3, False): (1, 3),
        (8, True): (2, 4),
        (8, False): (1, 8),
    }


def test_the_mesh_fills_the_processes() -> None:
    engine = EngineConfig(parallel=ParallelConfig(cfg_p_size=2, seq_p_size=4))
    engine.check_world(8, enable_cfg=True)
    EngineConfig().check_world(8, enable_cfg=True)
    with pytest.raises(
        ConfigError, match=r"= 8 processes, but 1 was started.*nproc_per_node=8, or use a preset for one"
    ):
        engine.check_world(1, enable_cfg=True)
    with pytest.raises(
        ConfigError, match="4 were started.*use cfg_p_size 2, seq_p_size 2 or cfg_p_size 1, seq_p_size 4"
    ):
        engine.check_world(4, enable_cfg=True)
    with pytest.raises(ConfigError, match=r"nproc_per_node=8, or use cfg_p_size 1, seq_p_size 4\."):
        engine.check_world(4, enable_cfg=False)
    with pytest.raises(ConfigError, match=r"or use cfg_p_size 1, seq_p_size 7\."):
        engine.check_world(7, enable_cfg=True)


def test_an_engine_makes_videos_of_its_task() -> None:
    i2v = Request(prompt="a cat", task="i2v", image_path="a.png")
    EngineConfig(task="i2v").check_request(i2v)
    EngineConfig(task="flf2v").check_request(i2v)
    with pytest.raises(BadRequest, match="loaded for t2v. Choose a preset for i2v"):
        EngineConfig(task="t2v").check_request(i2v)
    with pytest.raises(BadRequest, match="limit is 1000"):
        EngineConfig(max_tokens=1000).check_request(Request(prompt="a cat"))


@given(
    st.builds(
        EngineConfig,
        task=st.sampled_from(["t2v", "i2v", "flf2v"]),
        models_dir=st.none() | st.text(st.characters(categories=["L"]), min_size=1),
        lora_configs=st.just(()) | st.just(LORAS),
        cpu_offload=st.sampled_from([True, False, "auto"]),
        use_tiling_vae=st.sampled_from([True, False, "auto"]),
        parallel=st.none() | st.builds(ParallelConfig, cfg_p_size=st.integers(1, 2), seq_p_size=st.integers(1, 8)),
    )
)
def test_json_gives_the_same_configuration_back(engine: EngineConfig) -> None:
    assert EngineConfig.from_json(json.loads(json.dumps(engine.to_json()))) == engine
    assert hash(EngineConfig.from_json(engine.to_json())) == hash(engine)


def test_json_with_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'model_pth'. Did you mean 'model_path'"):
        EngineConfig.from_json({"model_pth": "a"})
    with pytest.raises(ConfigError, match="expected an object"):
        EngineConfig.from_json(None)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Wan-AI/Wan2.2-T2V-A14B", ("Wan-AI/Wan2.2-T2V-A14B", None)),
        ("Wan-AI/Wan2.2-T2V-A14B/", ("Wan-AI/Wan2.2-T2V-A14B", None)),
        ("owner/repo/a/b.safetensors", ("owner/repo", "a/b.safetensors")),
        ("encoders/t5/models_t5.pth", ("lightx2v/Encoders", "models_t5.pth")),
        ("/home/user/models/Wan-AI", None),
        ("./owner/repo", None),
        ("../owner/repo", None),
        ("~/owner/repo", None),
        ("owner", None),
        ("", None),
        ("owner/repo/../../etc/passwd", None),
        ("owner/repo/a//b", None),
        ("owner/re..po", None),
        ("owner/re--po", None),
        ("own er/repo", None),
        ("C:\\models\\wan", None),
        ("owner/repo/a\\..\\b", None),
        ("https://huggingface.co/owner/repo", None),
        ("assets/demo/Wan2.2-T2V-Demo", None),
    ],
)
def test_names_on_the_hub_are_told_from_paths(path: str, expected: tuple[str, str | None] | None) -> None:
    assert hub_name(path) == expected


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(EngineConfig)]), JUNK))
def test_junk_is_a_config_error_and_nothing_else(data: dict[str, object]) -> None:
    try:
        EngineConfig.from_json(data)
    except ConfigError as error:
        str(error).encode("utf-8")
