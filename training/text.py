"""The demo's text side while it trains: a small UMT5 encoder, and the table of tokenised captions it reads.

The stack is transformers', which the engine's equals; here it works on padded batches and holds its token table, too.
Padding rows become zeros, as the DiT expects.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from transformers.models.umt5.configuration_umt5 import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5Stack

from lightx2v.weights.umt5_names import wan_name

from .captions import OFFICIAL_NEGATIVE, caption
from .tokenizer import build_tokenizer
from .world import ATTRIBUTES, COMBINATIONS, split_combination

ROWS = 31  # tokens of the longest caption, and of Wan's negative prompt
VARIANTS = 24  # captions of each combination
PARTIAL = 0.35  # of them leave attributes out


class Text(nn.Module):
    """ids (B, L) -> states (B, L, D), zero where ids are padding."""

    def __init__(self, vocab: int, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        config = UMT5Config(
            vocab_size=vocab, d_model=width, d_kv=16, d_ff=128, num_layers=layers, num_heads=4, dropout_rate=0.0
        )
        config.is_encoder_decoder = config.use_cache = False
        config._attn_implementation = "eager"
        self.embedding = nn.Embedding(vocab, width)
        with torch.device("meta"):
            self.stack = UMT5Stack(config)
        self.stack.embed_tokens = None
        self.stack = self.stack.eval().to_empty(device="cpu")
        for name, parameter in self.stack.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                fan = parameter.shape[1] * (config.d_kv if ".q." in name else 1)
                nn.init.normal_(parameter, std=0.3 if "relative" in name else fan**-0.5)

    def forward(self, ids_BL: Tensor) -> Tensor:
        mask_BL = ids_BL != 0
        states = self.stack(inputs_embeds=self.embedding(ids_BL), attention_mask=mask_BL.long()).last_hidden_state
        return states.float() * mask_BL.unsqueeze(-1)

    def wan_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of Wan's T5 file."""
        named = {wan_name(f"encoder.{name}"): p.detach() for name, p in self.stack.named_parameters()}
        return {wan_name("shared.weight"): self.embedding.weight.detach()} | named


def tokenise(prompts: list[str], rows: int = ROWS) -> Tensor:
    """ids (N, rows), zero-padded. A longer prompt is cut."""
    table = torch.zeros(len(prompts), rows, dtype=torch.long)
    for i, encoding in enumerate(build_tokenizer().encode_batch(prompts)):
        ids = encoding.ids if len(encoding.ids) <= rows else [*encoding.ids[: rows - 1], encoding.ids[-1]]
        table[i, : len(ids)] = torch.tensor(ids)
    return table


class Captions:
    """Gives one of many captions for a combination of attributes, as ids on the device, and sometimes one for
    guidance."""

    def __init__(self, device: torch.device, seed: int, variants: int = VARIANTS) -> None:
        chance = random.Random(seed)
        parts = split_combination(torch.arange(COMBINATIONS))
        prompts = []
        for i in range(COMBINATIONS):
            words = {name: ATTRIBUTES[name][int(parts[name][i])] for name in ATTRIBUTES}
            for variant in range(variants):
                prompts.append(caption(words, chance, drop=0.35 if variant < PARTIAL * variants else 0.0))
        self.table = tokenise(prompts).view(COMBINATIONS, variants, ROWS).to(device)
        self.unconditional = tokenise(["", OFFICIAL_NEGATIVE]).to(device)

    def draw(self, combination: Tensor, drop: float) -> Tensor:
        """ids (B, ROWS). With probability `drop` an empty prompt or Wan's negative one, for guidance."""
        device = self.table.device
        count = len(combination)
        ids = self.table[combination, torch.randint(self.table.shape[1], (count,), device=device)]
        nothing = self.unconditional[(torch.rand(count, device=device) < 0.5).long()]
        return torch.where((torch.rand(count, device=device) < drop)[:, None], nothing, ids)
