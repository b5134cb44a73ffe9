"""Mesh: which part of a model each process computes. Guidance branches x parts of the sequence; all share the VAE."""

from typing import Any

from torch import Tensor

from .collectives import Collectives, shard_sizes
from .process_group import Group
from .spatial_shards import SpatialShards
from .ulysses import Ulysses


class Mesh:
    """The layout for one loaded model.

    `cfg` joins the two processes that do the two guidance branches of the same tokens, `seq` those that share one
    branch. With a `SingleProcess` every method is the identity.
    """

    def __init__(self, group: Group, cfg_p_size: int, seq_p_size: int) -> None:
        self.group = group
        self.cfg, seq, everyone = group.collectives_for(cfg_p_size, seq_p_size)
        self._branch_split = Ulysses(seq) if seq is not None else None
        self._whole_split = Ulysses(everyone) if self.cfg is not None and everyone is not None else self._branch_split
        groups = {"world": group, "cfg": self.cfg, "seq": seq, "all": everyone}
        self._collectives = {name: each for name, each in groups.items() if isinstance(each, Collectives)}

    def token_split(self, branches: int) -> Ulysses | None:
        """How a DiT splits its tokens in a step with one or two branches; None for no split.

        All processes share the single branch of an expert without guidance, so none repeats the work of another.
        """
        return self._whole_split if branches == 1 else self._branch_split

    def spatial_split(self, height: int) -> SpatialShards | None:
        """How all processes split latents of this height for the VAE; None with too few rows, or alone."""
        if not isinstance(self.group, Collectives) or height < self.group.size:
            return None
        return SpatialShards(self.group, shard_sizes(height, self.group.size))

    def local_branches(self, branches: list[Any]) -> list[Any]:
        """Of the prompt and the negative prompt, those that this process computes."""
        return branches if self.cfg is None or len(branches) < 2 else [branches[self.cfg.rank]]

    def gather_branches(self, velocities: list[Tensor], branches: int) -> list[Tensor]:
        """The velocities of all branches, from those that this process has computed."""
        if self.cfg is None or branches < 2:
            return velocities
        return list(self.cfg.all_gather(velocities[0][None], [1, 1]))

    @property
    def sent(self) -> dict[str, dict[str, int]]:
        """Bytes that this process has sent to others since `reset_counts`, by group and kind."""
        return {name: dict(collectives.sent) for name, collectives in self._collectives.items() if collectives.sent}

    def reset_counts(self) -> None:
        for collectives in self._collectives.values():
            collectives.sent.clear()
