"""Latency as a budget: a law in the sizes that can be differentiated, beside the times that were measured.

How long a shape takes is known as a function of a whole form only, such as that of `nestling.search.latency`. Chances
are projected with a stand-in for it,

    milliseconds = a + b layers + c weight_bytes + d kv_bytes + e state_bytes       a ... e >= 0,

by least squares of the relative error over shapes drawn from the space. What a member is held to at the end is the
measured function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.elastic.bill import Bill, Sizes
from nestling.elastic.space import PerRow, Space
from nestling.shape import Form, fit

Latency = Callable[[Form], float]  # milliseconds
READS = ("weight_bytes", "kv_bytes", "state_bytes")
DRAWN = 24  # shapes that the law is fitted to


@dataclass(frozen=True)
class Law:
    """The stand-in: what each of 1, layers and `READS` adds, in milliseconds."""

    bill: Bill
    weights: Tensor

    @classmethod
    def of(cls, space: Space, bill: Bill, latency: Latency) -> Law:
        generator = torch.Generator().manual_seed(0)
        drawn = [space.largest(), space.smallest(), *(space.drawn(generator) for _ in range(DRAWN - 2))]
        inputs = torch.stack([_reads(bill, *space.exactly(chosen)) for chosen in drawn])
        times = torch.tensor([latency(form_of(space, chosen)) for chosen in drawn], dtype=torch.float64)
        return cls(bill, _at_least_zero(inputs, times))

    def __call__(self, sizes: Sizes, gates: Tensor) -> Tensor:
        return (self.weights * _reads(self.bill, sizes, gates)).sum(-1)


def form_of(space: Space, chosen: PerRow) -> Form:
    """The form with these sizes `[rows]`."""
    return fit(space.anatomy, space.shape(chosen), space.kept(chosen), check_config=False)


def _reads(bill: Bill, sizes: Sizes, gates: Tensor) -> Tensor:
    layers = gates.sum(-1)
    return torch.stack([torch.ones_like(layers), layers, *(bill(name, sizes, gates) for name in READS)], dim=-1)


def _at_least_zero(inputs: Tensor, times: Tensor) -> Tensor:
    """Least squares of the relative error, dropping the most negative weight until none is."""
    scale = inputs.abs().amax(0).clamp(min=1e-30)
    relative = inputs / scale / times[:, None]
    used = [column for column in range(inputs.shape[1]) if inputs[:, column].any()]
    weights = torch.zeros(inputs.shape[1], dtype=torch.float64)
    while used:
        ones = torch.ones(len(times), 1, dtype=torch.float64)
        found = torch.linalg.lstsq(relative[:, used], ones, driver="gelsd").solution[:, 0]
        if (found >= 0).all():
            weights[used] = found
            break
        used.pop(int(found.argmin()))
    return weights / scale
