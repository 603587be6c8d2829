"""What attention over a compressed cache is given and what it tells: heads before their rotation, text, decisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .gates import without_channel

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Text:
    """What the tokens of one call are: real ones, and separators of documents, both `[batch, seq]`."""

    valid: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Decisions:
    """One layer's decisions of one call `[batch, heads, seq]`: merged (1) or not, for the loss with a gradient through
    the relaxed ones; the same without noise; logits. valid: real tokens `[batch, seq]`.

    Where tokens are dropped, `merged` at t says that the token before is, and counts if it is gone by the end of the
    text: either way tokens less those merged are the slots that are held then.
    """

    merged: Tensor
    quiet: Tensor
    logits: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Heads:
    """Queries `[batch, heads, group, seq, dim]`, keys and values `[batch, heads, seq, dim]`, not rotated.

    rotate: (queries `[batch, any, seq, dim]`, keys) -> the same at their positions. turn: cosines and sines of that
    `[batch or 1, seq, channels]`, if it is known to rotate channels i and i + half of the first `channels` ones (none
    where nothing is rotated).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rotate: Rotate
    scaling: float
    turn: tuple[Tensor, Tensor] | None = None

    def rotated(self, keys: Tensor, keep: float) -> tuple[Tensor, Tensor]:
        """Queries, and `keys` `[batch, heads, seq, dim]` in place of the tokens' own, rotated; the gate channel is
        multiplied by `keep` before and after."""
        query, keys = without_channel(self.query, keep), without_channel(keys.to(self.key.dtype), keep)
        flat, keys = self.rotate(query.flatten(1, 2), keys)
        return without_channel(flat.view_as(query), keep), without_channel(keys, keep)
