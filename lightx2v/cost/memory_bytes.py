"""How much memory each stage of a run takes under a plan: arithmetic only, so the page can show it in advance.

Bytes are those of tensors; `SLACK` and the ladder's `RESERVE` allow for the allocator and the CUDA context.
"""

from ..config.architecture import CHUNK, PATCH, DiTConfig, tile_side
from .memory_plan import PREFETCH_SLOTS, TEXT_BLOCKS, MemoryPlan, ModelSize, Workload

SLACK = 1.08
"""The allocator's loss to rounding and fragments, as a factor on everything but the weights."""

DECODE_ELEMENTS = 300_000
"""Values alive per latent pixel (8 x 8 pixels) while decoding: the memory of past frames, and the last stage's work.

That stage needs most: a residual block holds its input, the padded inputs of its two convolutions and their outputs, 4
frames each, at full size. Measured on an H100 for 1280x720 in bf16: 7.2 GiB.
"""

RIFE_WEIGHTS = 22 * 2**20
RIFE_BYTES = 145 * 4 * 64
"""Of RIFE in float32, for each latent pixel (8 x 8 pixels): two frames with their features, and the finest block."""


def block_weights(shape: DiTConfig) -> int:
    """Parameters of one block."""
    d, f = shape.dim, shape.ffn_dim
    attention = 4 * (d * d + d) + 2 * d
    return 2 * attention + 2 * d * f + f + d + 2 * d + 6 * d


def outside_weights(shape: DiTConfig) -> tuple[int, int]:
    """Parameters outside of the blocks: those in float32, and those of the text embedding."""
    d, out = shape.dim, PATCH**2 * shape.out_dim
    patch = PATCH**2 * shape.in_dim * d + d
    time = shape.freq_dim * d + d + d * d + d + 6 * d * d + 6 * d
    head = d * out + out + 2 * d
    text = shape.text_dim * d + d + d * d + d
    return patch + time + head, text


def block_bytes(model: ModelSize) -> int:
    return int(block_weights(model.dit) * model.weight)


def outside_bytes(model: ModelSize) -> int:
    wide, text = outside_weights(model.dit)
    return 4 * wide + model.compute * text


def expert_bytes(model: ModelSize) -> int:
    return block_bytes(model) * model.dit.num_layers + outside_bytes(model)


def denoise_bytes(
    model: ModelSize, workload: Workload, *, sequential_cfg: bool = False, cache_text_kv: bool = True
) -> int:
    """Activations at the peak of a block, and the prompts' keys and values; not the weights.

    Per token and channel: the residual in float32, one for each branch that does not wait for its turn; then the normed
    input, queries, keys and values, or these without the input and with the attention's output. 8-bit products add
    their input in 8 bits, and some attention kernels theirs. The feed-forward runs in chunks: its input and two inner
    tensors. A block of GGUF weights holds what it has dequantised until it has run: three matrices when the
    self-attention needs most, all of them when the feed-forward does. Forwards that are skipped reuse what all blocks
    added, in the dtype of products.
    """
    d, e, branches = model.dit.dim, model.compute, 1 if sequential_cfg else workload.branches
    eight_bit = model.weight < e and not model.dequantised
    attention = workload.tokens * d * (4 * e + eight_bit + model.attention)
    feed_forward = min(CHUNK, workload.tokens) * (d + 2 * model.dit.ffn_dim) * e
    if model.dequantised:
        attention += 3 * d * d * e
        feed_forward += (8 * d * d + 2 * d * model.dit.ffn_dim) * e
    rotations = workload.tokens * model.dit.head_dim * 4  # float32, for the channels of a head
    text = (
        (workload.branches + workload.avoided)
        * model.dit.text_len
        * d
        * e
        * 2
        * (model.dit.num_layers if cache_text_kv else 1)
    )
    residuals = workload.residuals * workload.tokens * d * e
    return 4 * workload.tokens * d * branches + residuals + max(attention, feed_forward) + rotations + text


def decode_bytes(model: ModelSize, workload: Workload, *, tiling: bool = False) -> int:
    """Decoding, besides the VAE's weights. Tiles run one after another; finished frames wait in host memory. RIFE runs
    between two chunks, on whole frames, while the VAE keeps its memory of past frames."""
    height, width = (tile_side(side) if tiling else side for side in (workload.height, workload.width))
    return height * width * DECODE_ELEMENTS * model.vae_element + (rife_bytes(workload) if workload.rife else 0)


def rife_bytes(workload: Workload) -> int:
    """RIFE and its work on two frames, whose sides it fills up to multiples of 64 pixels."""
    height, width = (-(-side // 8) * 8 for side in (workload.height, workload.width))
    return RIFE_WEIGHTS + height * width * RIFE_BYTES


def lora_bytes(model: ModelSize, plan: MemoryPlan) -> int:
    """Device memory of LoRAs that are not merged into the weights."""
    if model.dequantised and not model.loras_beside:
        return model.loras if plan.mode == "resident" else 0
    return model.loras if model.loras_beside or plan.reads_disk else 0


def stage_bytes(plan: MemoryPlan, model: ModelSize, workload: Workload) -> dict[str, int]:
    """The device memory of each stage, in the order of a run."""
    per_block = block_bytes(model)
    if plan.mode == "resident":
        experts = 2 * expert_bytes(model)
    else:
        streamed = model.dit.num_layers - plan.resident_blocks
        experts = outside_bytes(model) + per_block * (plan.resident_blocks + min(plan.prefetch_slots, streamed))
    staying = (model.text if plan.text == "resident" else 0) + (model.vae if plan.vae == "resident" else 0)
    staying += lora_bytes(model, plan)
    beside = staying + (experts if plan.keep_experts else 0)
    text = {"resident": 0, "move": model.text, "stream": model.text * PREFETCH_SLOTS // TEXT_BLOCKS}[plan.text]
    vae = model.vae if plan.vae != "resident" else 0
    work = {
        "text": 64 * 2**20,
        "denoise": denoise_bytes(model, workload, sequential_cfg=plan.sequential_cfg, cache_text_kv=plan.cache_text_kv),
        "decode": decode_bytes(model, workload, tiling=plan.tiling),
    }
    weights = {"text": beside + text, "denoise": staying + experts, "decode": beside + vae}
    return {stage: int(weights[stage] + SLACK * work[stage]) for stage in work}


def host_bytes(plan: MemoryPlan, model: ModelSize) -> int:
    """The weights that wait in host memory, and LoRAs beside them; those that runs read from disk do not."""
    experts = 0 if plan.mode == "resident" or plan.from_disk else 2 * expert_bytes(model)
    experts += model.loras - lora_bytes(model, plan) if model.dequantised else 0
    text = 0 if plan.text == "resident" else model.text
    return int(experts + text + (0 if plan.vae == "resident" else model.vae))
