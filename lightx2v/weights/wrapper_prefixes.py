"""Wrapper prefixes: what frameworks and programs put in front of a network's own tensor names, or between their parts.

torch.compile, DDP, FSDP and activation checkpointing wrap modules; pipelines and trainers keep a network under a name
of their own. None of these is a part of a network, so all are looked through, also several at once:
`module._orig_mod.pipe.dit.blocks.0…` is `blocks.0…`.
"""

import re

from ..errors import CheckpointError

_WRAPPERS = re.compile(
    r"(?<![^.])_(?:orig_mod|fsdp_wrapped_module|fpw_module|checkpoint_wrapped_module|forward_module)\."
)
_ANYWHERE = "model|module|net|network|pipe|pipeline|base_model|state_dict|ema|ema_model|student"
_DIT = (
    f"{_ANYWHERE}|diffusion_model|transformer(?:_2)?|dit_?2?|unet|generator(?:_ema)?|wan|(?:high|low)_noise(?:_model)?"
)
_VAE = f"{_ANYWHERE}|vae|first_stage_model"
_TEXT = f"{_ANYWHERE}|text_encoders?|cond_stage_model|conditioner|t5|t5xxl|umt5|umt5xxl|transformer"
_DIT_PREFIX, _VAE_PREFIX, _TEXT_PREFIX = (re.compile(rf"(?:(?:{parts})\.)+") for parts in (_DIT, _VAE, _TEXT))


def unwrap_dit(name: str) -> str:
    """The name of an expert's tensor, or of a LoRA's layer, without wrappers."""
    return _unwrap(name, _DIT_PREFIX)


def unwrap_vae(name: str) -> str:
    """The name of a VAE's tensor without wrappers."""
    return _unwrap(name, _VAE_PREFIX)


def unwrap_text_encoder(name: str) -> str:
    """The name of a text encoder's tensor without wrappers."""
    return _unwrap(name, _TEXT_PREFIX)


def _unwrap(name: str, prefix: re.Pattern[str]) -> str:
    bare = _WRAPPERS.sub("", name)
    match = prefix.match(bare)
    return bare[match.end() :] if match else bare


def each_once(names: dict[str, str], source: str) -> dict[str, str]:
    """`names` ({the file's name: the network's}) as they are. CheckpointError of the file `source` where two become
    one."""
    seen: dict[str, str] = {}
    for name, ours in names.items():
        if ours in seen:
            raise CheckpointError(
                f"{source} holds {ours:.80} twice, as {seen[ours]:.80} and as {name:.80}. Keep one of them."
            )
        seen[ours] = name
    return names
