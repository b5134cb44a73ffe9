"""The text encoder equals transformers' own, whatever the prompt, and costs no more than the prompt is long."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyModels
from tiny import T5Sizes, random_t5, write_tokenizer
from umt5_reference import same_in_transformers

from lightx2v.config.prompt_cleaning import clean_prompt
from lightx2v.errors import CheckpointError
from lightx2v.models.umt5 import TextEncoder, load_tokenizer
from lightx2v.models.umt5_stack import UMT5Sizes, UMT5Stack
from lightx2v.weights.checkpoint import open_checkpoint
from lightx2v.weights.umt5_names import hf_name, wan_name

PROMPTS = (
    "a red ball moves left over green grass",
    "一个红色的球在草地上",
    "tabs\tand\nlines, &amp;amp; entities — “quotes” 🎈",
    "",
    "x" * 300,
)
TOKENIZER = Path("google") / "umt5-xxl"
T5_SIZES = UMT5Sizes(vocab=0, width=32, heads=4, head_dim=8, ffn=64, layers=2, buckets=32)


def load(model: Path, dtype: torch.dtype = torch.float32, text_len: int = 512) -> TextEncoder:
    return TextEncoder.load(
        model / "models_t5_umt5-xxl-enc-bf16.pth", model / TOKENIZER, dtype=dtype, text_len=text_len
    )


@pytest.fixture(scope="module")
def encoder(tiny: TinyModels) -> TextEncoder:
    return load(tiny.t2v)


@pytest.fixture(scope="module")
def weights(tiny: TinyModels) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(tiny.t2v / "models_t5_umt5-xxl-enc-bf16.pth")
    return {name: tensor.float() for name, tensor in checkpoint.tensors()}


@pytest.fixture(scope="module")
def theirs(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    return same_in_transformers(weights)


def padded(model: torch.nn.Module, tokenizer: Path, prompt: str) -> torch.Tensor:
    """The official way: 512 tokens, a mask over the padding, and the padding cut off again."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(tokenizer)(
        [clean_prompt(prompt)],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=512,
        add_special_tokens=True,
    )
    with torch.no_grad():
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return states[0, : int(batch.attention_mask.sum())]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_rows_are_those_of_the_padded_run(
    encoder: TextEncoder, theirs: torch.nn.Module, tiny: TinyModels, prompt: str
) -> None:
    expected = padded(theirs, tiny.t2v / TOKENIZER, prompt)
    got = encoder.encode(prompt)
    assert got.states_LD.shape == expected.shape
    assert (got.tokens, got.truncated) == (len(expected), False)
    assert relative_error(got.states_LD, expected) <= 1e-5


def test_a_long_prompt_is_cut_as_the_tokenizer_cuts_it_and_says_so(
    encoder: TextEncoder, theirs: torch.nn.Module, tiny: TinyModels
) -> None:
    prompt = "red ball " * 400
    got = encoder.encode(prompt)
    assert (got.tokens, got.truncated, len(got.states_LD)) == (801, True, 512)
    assert relative_error(got.states_LD, padded(theirs, tiny.t2v / TOKENIZER, prompt)) <= 1e-5


def test_the_limit_itself_is_not_a_cut(encoder: TextEncoder) -> None:
    assert not encoder.encode("red " * 511).truncated
    assert encoder.encode("red " * 512).truncated


def test_against_the_formulas(encoder: TextEncoder, weights: dict[str, torch.Tensor]) -> None:
    """The published equations in float64: RMS norm, biased attention without scale, gated tanh-GELU."""
    prompt = "a red ball moves left, then right, then up and down again " * 9  # past 128 positions
    ids = encoder.tokenizer.encode(clean_prompt(prompt)).ids
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["token_embedding.weight"][ids]
    length = len(ids)
    assert length > 150

    def rms(values: torch.Tensor, name: str) -> torch.Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * w[name]

    def bucket(distance: int) -> int:
        side = 16 if distance > 0 else 0
        near = abs(distance)
        far = 8 + int(math.log(max(near, 1) / 8) / math.log(128 / 8) * 8)
        return side + (near if near < 8 else min(far, 15))

    buckets = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])
    for block in ("blocks.0", "blocks.1"):
        h = rms(x, f"{block}.norm1.weight")
        q, k, v = ((h @ w[f"{block}.attn.{leaf}.weight"].T).view(length, 4, 8).transpose(0, 1) for leaf in "qkv")
        bias = w[f"{block}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        mixed = torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v
        x = x + mixed.transpose(0, 1).reshape(length, 32) @ w[f"{block}.attn.o.weight"].T
        h = rms(x, f"{block}.norm2.weight")
        gate = F.gelu(h @ w[f"{block}.ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ w[f"{block}.ffn.fc1.weight"].T)) @ w[f"{block}.ffn.fc2.weight"].T
    expected = rms(x, "norm.weight")
    assert relative_error(encoder.encode(prompt).states_LD.double(), expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_transformers(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    stack = UMT5Stack(T5_SIZES)
    theirs = same_in_transformers(weights).to(dtype)
    theirs.set_attn_implementation("eager")
    stack.load_state_dict(
        {
            hf_name(name).removeprefix("encoder."): tensor
            for name, tensor in weights.items()
            if name != "token_embedding.weight"
        }
    )
    stack = stack.to(dtype)
    for length in (1, 7, 150, 512):  # up to distances beyond the last bucket
        rows_BLD = torch.randn(2, length, T5_SIZES.width, generator=torch.Generator().manual_seed(length)).to(dtype)
        with torch.no_grad():
            expected = theirs.encoder(inputs_embeds=rows_BLD).last_hidden_state
            assert torch.equal(stack(rows_BLD), expected)


def test_bf16_stays_close_to_fp32(encoder: TextEncoder, tiny: TinyModels) -> None:
    half = load(tiny.t2v, torch.bfloat16).encode(PROMPTS[0]).states_LD
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), encoder.encode(PROMPTS[0]).states_LD) <= 2e-2


def test_fp16_is_too_narrow_and_becomes_bf16(tiny: TinyModels) -> None:
    assert load(tiny.t2v, torch.float16).encode("red").states_LD.dtype == torch.bfloat16


def test_the_same_prompt_gives_the_same_bits_and_no_graph(encoder: TextEncoder) -> None:
    first, second = (encoder.encode(PROMPTS[0]).states_LD for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad and not first.is_inference()


def test_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    sizes = T5Sizes(width=24, heads=2, head_dim=16, ffn=40, layers=3)
    vocabulary = write_tokenizer(tmp_path)
    state = random_t5(sizes, vocabulary + 7, seed=1)
    found = UMT5Sizes.from_shapes({hf_name(name): tuple(tensor.shape) for name, tensor in state.items()})
    expected = UMT5Sizes(vocab=vocabulary + 7, width=24, heads=2, head_dim=16, ffn=40, layers=3, buckets=32)
    assert found == expected
    torch.save(state, tmp_path / "t5.pth")
    assert TextEncoder.load(tmp_path / "t5.pth", tmp_path).encode("red").states_LD.shape[1] == 24


def test_names_survive_the_way_there_and_back(weights: dict[str, torch.Tensor], theirs: torch.nn.Module) -> None:
    assert [wan_name(hf_name(name)) for name in weights] == list(weights)
    assert {hf_name(name) for name in weights} == theirs.state_dict().keys() - {"encoder.embed_tokens.weight"}
    assert hf_name("blocks.0.other") == wan_name("blocks.0.other") == "blocks.0.other"


def test_transformers_own_folder_loads_too(tiny: TinyModels, encoder: TextEncoder, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = open_checkpoint(tiny.t2v / "models_t5_umt5-xxl-enc-bf16.pth")
    state = {hf_name(name): tensor for name, tensor in checkpoint.tensors()}
    save_file(state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}, tmp_path / "model.safetensors")
    other = TextEncoder.load(tmp_path, tiny.t2v / TOKENIZER, dtype=torch.float32)
    assert torch.equal(other.encode(PROMPTS[0]).states_LD, encoder.encode(PROMPTS[0]).states_LD)


def test_the_token_table_is_not_a_weight_that_moves(encoder: TextEncoder) -> None:
    assert not any(parameter.numel() == encoder.embedding_VD.numel() for parameter in encoder.parameters())
    assert not any(tensor.is_meta for tensor in encoder.state_dict().values())


# Tokens and cleaning


@pytest.mark.parametrize("prompt", [*PROMPTS, "🎈🎈 naïve Ａ", "  spaces   everywhere  "])
def test_tokens_are_those_of_auto_tokenizer(tiny: TinyModels, prompt: str) -> None:
    from transformers import AutoTokenizer

    folder = tiny.t2v / TOKENIZER
    assert load_tokenizer(folder).encode(prompt).ids == AutoTokenizer.from_pretrained(folder)(prompt).input_ids


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("  a \t red\n\nball ", "a red ball"),
        ("cat &amp;amp; dog &lt;3", "cat & dog <3"),
        ("schÃ¶n", "schön"),
        ("“quoted” ﬁne", '"quoted" fine'),
        ("红色\u3000的球", "红色 的球"),
        ("nul\x00 and lone \ud800 half", "nul and lone � half"),
    ],
)
def test_prompts_are_cleaned_as_the_official_code_does(encoder: TextEncoder, dirty: str, clean: str) -> None:
    assert clean_prompt(dirty) == clean
    assert clean_prompt(clean) == clean
    assert torch.equal(encoder.encode(dirty).states_LD, encoder.encode(clean).states_LD)


# Files that do not fit


def test_a_file_that_is_no_text_encoder(tiny: TinyModels) -> None:
    with pytest.raises(CheckpointError, match=r"Wan2\.1_VAE\.pth is not a UMT5 encoder"):
        TextEncoder.load(tiny.t2v / "Wan2.1_VAE.pth", tiny.t2v / TOKENIZER)


def test_a_text_encoder_that_lacks_a_layer_or_has_another_shape(tmp_path: Path) -> None:
    vocabulary = write_tokenizer(tmp_path)
    state = random_t5(T5Sizes(), vocabulary, seed=1)
    del state["blocks.1.ffn.fc2.weight"]
    state["blocks.0.attn.k.weight"] = state["blocks.0.attn.k.weight"][:8].clone()
    torch.save(state, tmp_path / "t5.pth")
    with pytest.raises(CheckpointError) as caught:
        TextEncoder.load(tmp_path / "t5.pth", tmp_path)
    assert "1 missing: encoder.block.1.layer.1.DenseReluDense.wo.weight" in str(caught.value)
    assert "k.weight has shape [8, 32], expected [32, 32]" in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    vocabulary = write_tokenizer(tmp_path)
    torch.save(random_t5(T5Sizes(), vocabulary - 1, seed=1), tmp_path / "t5.pth")
    with pytest.raises(CheckpointError, match=f"tokenizer with {vocabulary} tokens.*has {vocabulary - 1}"):
        TextEncoder.load(tmp_path / "t5.pth", tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"model": []}', '{"model": {"type": "BPE"}}', "version https://git-lfs.github.com/spec/v1"]
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.slow
def test_loading_imports_neither_transformers_nor_torchs_compiler(tiny: TinyModels) -> None:
    """They take seconds, in which no other thread reads weights. What is slow comes when it is asked for."""
    file, tokenizer = tiny.t2v / "models_t5_umt5-xxl-enc-bf16.pth", tiny.t2v / TOKENIZER
    code = (
        "import sys; from lightx2v.models.umt5 import TextEncoder, preload; slow = {'ftfy', 'tokenizers'};"
        "assert not slow & set(sys.modules); preload(); assert slow <= set(sys.modules);"
        f"TextEncoder.load({str(file)!r}, {str(tokenizer)!r}).encode('red');"
        "assert not {'transformers', 'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=120)
