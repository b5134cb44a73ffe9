"""Where weights live while a run needs them: `with placement.expert("high") as dit`.

The models know nothing of this, and neither does the loop; a placement hands out each part on the device and takes it
back. `Resident` keeps everything on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from .adapters import Applied, ExpertLoras, match_loras
from .attention import Choice
from .components import (
    Precision,
    Which,
    check_channels,
    expert_weights,
    load_expert,
    load_text_encoder,
    load_vae,
)
from .engine_config import EngineConfig
from .errors import CheckpointError, LoraError
from .models.dit import WanDiT
from .models.umt5 import TextEncoder
from .models.vae import WanVAE
from .request import LoraSpec
from .weights.locate import ModelFiles


class Placement(Protocol):
    """Hands out the parts of a model. A part may be used inside its `with` block only."""

    def text(self) -> AbstractContextManager[TextEncoder]: ...

    def expert(self, which: Which) -> AbstractContextManager[WanDiT]: ...

    def vae(self) -> AbstractContextManager[WanVAE]: ...

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        """Exchanges the LoRAs of both experts. LoraError, with the old ones still on, where one does not fit."""

    @property
    def loras(self) -> tuple[Applied, ...]:
        """The LoRAs that are on."""
        ...

    def close(self) -> None:
        """Drops all weights."""


class Resident:
    """Everything on the device, all the time."""

    def __init__(
        self,
        files: ModelFiles,
        config: EngineConfig,
        precision: Precision,
        self_attention: Choice,
        cross_attention: Choice,
    ) -> None:
        self._text: TextEncoder | None = load_text_encoder(files, config, precision)
        self._experts: dict[Which, WanDiT] = {}
        self._loras: dict[Which, ExpertLoras] = {}
        for which in ("high", "low"):
            weights = expert_weights(files, which, config)
            loras = match_loras(config.lora_configs, which, weights, config)
            used = weights if ExpertLoras.dynamic(weights, config) else weights.with_loras(loras)
            dit = load_expert(files, used, precision, self_attention, cross_attention)
            check_channels(dit, config.task, f"The {which}-noise expert")
            self._experts[which] = dit
            self._loras[which] = ExpertLoras(dit, which, weights, loras, config)
        if self._experts["high"].config != self._experts["low"].config:
            raise CheckpointError(
                "The two experts have different architectures. Use the high-noise and low-noise files of one model."
            )
        self._vae: WanVAE | None = load_vae(files, precision)

    @contextmanager
    def text(self) -> Iterator[TextEncoder]:
        assert self._text is not None, "the placement is closed"
        yield self._text

    @contextmanager
    def expert(self, which: Which) -> Iterator[WanDiT]:
        yield self._experts[which]

    @contextmanager
    def vae(self) -> Iterator[WanVAE]:
        assert self._vae is not None, "the placement is closed"
        yield self._vae

    def use_loras(self, specs: Sequence[LoraSpec]) -> None:
        before = {which: loras.specs for which, loras in self._loras.items()}
        try:
            for loras in self._loras.values():
                loras.use(specs)
        except LoraError:
            for which, loras in self._loras.items():
                loras.use(before[which])
            raise

    @property
    def loras(self) -> tuple[Applied, ...]:
        return tuple(applied for loras in self._loras.values() for applied in loras.applied)

    def close(self) -> None:
        self._text = self._vae = None
        self._experts.clear()
        self._loras.clear()
