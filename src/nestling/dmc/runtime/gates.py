"""Decisions: does a token merge into the newest slot of a head, and with which weight (arXiv 2403.09636, section 3).

With the method `dms` (arXiv 2506.05345) the same decision says that the token before is dropped, once it is out of a
window, and there are no weights.

The last channel of a head's key decides, the last channel of its queries weighs; no parameter is added:

    a_t     = scale * k_t[-1] - offset          merge if a_t > 0, append otherwise
    omega_t = sigmoid(scale * mean over the group's heads of q_t[-1] + offset)

Both are read before the rotation, and the channel takes no part in the scores afterwards. The last channel is rotated
by the slowest frequency, so its partner loses least. Everything here is computed in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

METHODS = ("dmc", "dms")
EPS = 2.0**-23  # keeps the sum of weights of a slot above zero


@dataclass(frozen=True)
class Gates:
    """How decisions are read: the fields of `config.dmc`.

    keep: factor of the gate channel in plain attention; decisions are read only at 0. shared: one decision per layer,
    from the mean over its heads (DMC-C). temperature: of the relaxed decision in training. method: `dmc`, tokens merge,
    or `dms`, they are dropped when `window` later tokens have come.
    """

    scale: float = 10.0
    offset: float = 5.0
    temperature: float = 0.1
    keep: float = 1.0
    shared: bool = False
    method: str = "dmc"
    window: int = 16

    @classmethod
    def of(cls, config: Any) -> Gates:
        """The gates that a model's config describes."""
        fields = config.dmc
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})

    @property
    def active(self) -> bool:
        return self.keep == 0

    @property
    def spared(self) -> int:
        """Tokens after a key to which a decision about it does not matter yet."""
        return self.window if self.method == "dms" else 0

    @property
    def recent(self) -> int:
        """Newest tokens of which a cache knows the slots: those that are not dropped yet."""
        return self.window + 1 if self.method == "dms" else 0


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def logits(query: Tensor, key: Tensor, gates: Gates) -> tuple[Tensor, Tensor]:
    """Merge logits a and weights omega `[batch, heads, seq]`.

    query: `[batch, heads, group, seq, dim]`. key: `[batch, heads, seq, dim]`. Neither rotated.
    """
    if not gates.active:
        shape = key.shape[:-1]
        never = torch.full(shape, -torch.inf, dtype=wide(key.dtype), device=key.device)
        return never, torch.ones_like(never)
    merge = gates.scale * key[..., -1].to(wide(key.dtype)) - gates.offset
    weight = gates.scale * query[..., -1].to(wide(query.dtype)).mean(2) + gates.offset
    if gates.shared:
        merge = merge.mean(1, keepdim=True).expand_as(merge)
    return merge, torch.sigmoid(weight) + EPS


def relaxed(merge: Tensor, gates: Gates) -> Tensor:
    """The noisy logits of Gumbel-sigmoid decisions, whose sigmoid is alpha in (0, 1); heads that share decisions share
    the noise."""
    noise = torch.rand_like(merge[:, :1] if gates.shared else merge)
    noise = torch.logit(noise, eps=torch.finfo(noise.dtype).tiny)
    return (merge + noise) / gates.temperature


def without_channel(states: Tensor, keep: float) -> Tensor:
    """States `[..., dim]` with their last channel times `keep`."""
    factor = torch.ones(states.shape[-1], dtype=states.dtype, device=states.device)
    factor[-1] = keep
    return states * factor


def forced(valid: Tensor, ends: Tensor, before: Tensor, seen: Tensor) -> Tensor:
    """Tokens that open a slot whatever their gate says `[batch, seq]`: the first of a sequence, a separator of
    documents, and the token after it.

    valid: real tokens `[batch, seq]`. ends: separators `[batch, seq]`. before: whether the last token before these was
    one `[batch]`. seen: whether there are tokens before these `[batch]`.
    """
    opens = (valid.cumsum(1) == 1) & ~seen[:, None]
    place = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1).cummax(1).values
    last = torch.nn.functional.pad(place[:, :-1], (1, 0), value=-1)  # the real token before each, -1 if none here
    after = torch.where(last < 0, before[:, None], ends.gather(1, last.clamp_min(0)))
    return valid & (opens | ends | after)
