"""Who does what for one loaded model: guidance branches x parts of the sequence, and all processes for the VAE."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..progress import CancelToken
from .collectives import Wire, shares
from .process_group import World
from .ulysses import Ulysses
from .vae_bands import Rows


class Mesh:
    """`cfg` joins the two processes that do the two branches of the same tokens, `seq` those of the same branch."""

    def __init__(self, world: World, cfg_p_size: int, seq_p_size: int) -> None:
        self.world = world
        self.cfg, seq, everybody = world.wires(cfg_p_size, seq_p_size)
        self._beside = Ulysses(seq) if seq is not None else None
        self._alone = Ulysses(everybody) if self.cfg is not None else self._beside
        self._wires = {"world": world.wire, "cfg": self.cfg, "seq": seq, "all": everybody}

    def split(self, branches: int) -> Ulysses | None:
        """How a DiT's tokens are shared in a step of one or two branches.

        Where one expert has no guidance, all processes share its one branch: none repeats the work of another.
        """
        return self._alone if branches == 1 else self._beside

    def rows(self, height: int) -> Rows | None:
        """How latents of this height are split over all processes for the VAE; None if they are too few rows."""
        return Rows(self.world.wire, shares(height, self.world.size)) if height >= self.world.size else None

    def branch(self, branches: list[Any]) -> list[Any]:
        """Of the prompt and the negative prompt those that this process has to do."""
        return branches if self.cfg is None or len(branches) < 2 else [branches[self.cfg.rank]]

    def both(self, velocities: list[Tensor], branches: int) -> list[Tensor]:
        """The velocities of all branches, from those of this process's."""
        if self.cfg is None or branches < 2:
            return velocities
        return list(self.cfg.collect(velocities[0][None], [1, 1]))

    @property
    def sent(self) -> dict[str, dict[str, int]]:
        """Bytes this process has sent to others since `count_anew`, by group and kind."""
        return {name: dict(wire.sent) for name, wire in self._wires.items() if wire is not None and wire.sent}

    def count_anew(self) -> None:
        for wire in self._wires.values():
            if wire is not None:
                wire.sent.clear()


class SharedCancel(CancelToken):
    """A run's cancel flag on all processes: whoever is asked to stop, they stop at the same `check`.

    `check` is an exchange, so all must call it at the same places: between steps and between chunks of the VAE.
    """

    def __init__(self, wire: Wire, token: CancelToken | None) -> None:
        super().__init__()
        self._wire, self._token = wire, token

    @property
    def cancelled(self) -> bool:
        return super().cancelled or (self._token is not None and self._token.cancelled)

    def check(self) -> None:
        if self._wire.agree(self.cancelled, all_of_them=False):
            self.cancel()
            super().check()
