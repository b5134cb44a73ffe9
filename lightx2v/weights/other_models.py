"""Other Wan models, told from Wan2.2-A14B's experts by the names and shapes of their tensors."""

from collections.abc import Mapping

from ..config.architecture import INPUT_CHANNELS
from ..errors import CheckpointError

PARTS = (
    ("vace_", "a VACE model (vace_blocks)"),
    ("face_adapter.", "Wan2.2-Animate (face_adapter)"),
    ("casual_audio_encoder.", "Wan2.2-S2V (casual_audio_encoder)"),
    ("audio_injector.", "Wan2.2-S2V (audio_injector)"),
    ("audio_proj.", "a talking model such as MultiTalk, FantasyTalking or HuMo (audio_proj)"),
    ("control_adapter.", "a Fun-Camera model (control_adapter)"),
    ("ref_conv.", "a Fun-Control model (ref_conv)"),
    ("fps_embedding.", "SkyReels-V2 (fps_embedding)"),
    ("dwpose_embedding.", "UniAnimate (dwpose_embedding)"),
    ("condition_embedder.image_embedder.", "Wan2.1's image-to-video model (image_embedder)"),
    ("img_emb.", "Wan2.1's image-to-video model (img_emb)"),
)
"""The beginning of tensor names that only one kind of model has, the most special first."""


def other_model(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What the tensors with these names of Wan's are, if not an expert of Wan2.2-A14B's kind; "" otherwise.

    Sources: the `__init__` of each model in Wan-Video/Wan2.1, Wan-Video/Wan2.2 and aigc-apps/VideoX-Fun.
    """
    for part, model in PARTS:
        if any(name.startswith(part) for name in shapes):
            return model
    patch, head = shapes.get("patch_embedding.weight", ()), shapes.get("head.head.weight", ())
    if len(patch) != 5 or not head:
        return ""
    width, channels, latent = patch[0], patch[1], head[0] // (patch[3] * patch[4] or 1)
    if latent == channels == 48:
        return "Wan2.2-TI2V-5B (48 latent channels)"
    if channels not in INPUT_CHANNELS.values():
        known = {32: "a Fun-Control or Fun-Camera model", 48: "a Fun-Control model", 52: "a Fun-Control model"}
        return f"{known.get(channels, 'another Wan model')} ({channels} input channels)"
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    return "Wan2.1's 1.3B model (1536 channels, 30 blocks)" if (width, blocks) == (1536, 30) else ""


def require_expert(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Refuse another model by its name. `shapes` are those of the file `source`, by Wan's names."""
    if model := other_model(shapes):
        raise CheckpointError(
            f"{source} is {model}. This program runs Wan2.2-A14B only, whose experts have 16 input channels for text "
            "to video and 36 for image to video. Choose such a file."
        )
