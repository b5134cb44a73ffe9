"""Places: where on the machines of a cluster replicas can be."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

SLOT = "lightx2v"
"""Ray's resource of a machine without GPUs that is to make videos: the number of processes. Without it such a machine,
often the cluster's head, makes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster. `name` may be that of several."""

    id: str
    name: str
    gpus: int = 0
    slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Room for the replica `index` of a machine, with `gpus` GPUs, or as many processes on a machine without."""

    node: Node
    index: int
    gpus: int

    @property
    def has_gpus(self) -> bool:
        return self.node.gpus > 0

    @property
    def share(self) -> int:
        """How many replicas share the machine's cores."""
        return (self.node.gpus or self.node.slots) // self.gpus

    @property
    def key(self) -> tuple[str, int]:
        return self.node.id, self.index


def free_places(nodes: Iterable[Node], taken: Collection[tuple[str, int]], gpus: int) -> list[Place]:
    """All places for replicas of `gpus` GPUs that are not `taken`, machine by machine, so that an idle machine stays
    idle and can be given back. First those that already have some."""
    ordered = sorted(nodes, key=lambda node: (-sum(id == node.id for id, _ in taken), node.name, node.id))
    places = (
        Place(node=node, index=index, gpus=gpus)
        for node in ordered
        for index in range((node.gpus or node.slots) // gpus)
    )
    return [place for place in places if place.key not in taken]
