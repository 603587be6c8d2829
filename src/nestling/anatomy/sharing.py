"""Layers that share tensors: who has which set, and what is left of that when layers go.

A declaration names one block whose tensors come in a few sets; the layers that have the block take the sets in turn
(`Shared`). Where the sets are tied, what is shared is one tensor under several names: it is counted and cut once, and
ranked over all the layers that use it. Nothing here knows what the tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

USE = "{use}"


@dataclass(frozen=True)
class Sharing:
    """Which layers share tensors.

    block: the block that they share, None if there is none. takers: the layers that have it, ascending. count: how many
    sets there are at most. tied: whether a set is one, not a copy for each layer.
    """

    block: str | None
    takers: tuple[int, ...]
    count: int
    tied: bool

    @property
    def sets(self) -> int:
        return min(len(self.takers), self.count)

    def turns(self, layer: int) -> tuple[int, ...]:
        """The layers whose turn is with the same set as that of a layer with the block, tied or not."""
        return self.takers[self.takers.index(layer) % self.sets :: self.sets]

    def sharers(self, layer: int) -> tuple[int, ...]:
        """The layers that use the tensors which a layer uses, ascending; the layer alone if it shares none."""
        return self.turns(layer) if self.tied and layer in self.takers else (layer,)

    def is_copy(self, layer: int, kept: Sequence[int]) -> bool:
        """Whether the set that a kept layer uses is one that an earlier one of the `kept` layers has."""
        return layer != next(other for other in self.sharers(layer) if other in kept)

    def in_turn(self, kept: Sequence[int]) -> bool:
        """Whether the layers that stay can go on taking the sets in turn, as a config has it."""
        had = [self.takers.index(layer) % self.sets for layer in kept if layer in self.takers]
        first = had[: self.sets]
        return len(set(first)) == len(first) and all(one == had[i % len(first)] for i, one in enumerate(had))

    def named(self, pattern: str, use: int, kept: Sequence[int]) -> str:
        """The name of a tensor that is for the layer `use` alone, when the `kept` layers are there."""
        return pattern.replace(USE, str([layer for layer in self.takers if layer in kept].index(use)))
