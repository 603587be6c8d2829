"""Running aggregates of activations: one number per unit from any number of tokens, in memory for one number.

Minitron's scores reduce over the sequence first, then over the batch (arXiv 2407.14679, section 2.2 and table 11):

    mean = 1/n sum |s|        l2 = sqrt(sum s^2)        var = 1/n sum (s - mean s)^2

Over the sequence there are two more, for metrics of other papers: `sum`, with sign, and `each`, which leaves tokens
apart so that the batch step goes over all of them. Rows are added up in float64 and the batch step is taken once at
the end, so that neither the order of the batches nor their size matters, nor which process saw them. Padding is left
out of every sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestling import processes
from nestling.errors import NestlingError


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.linalg.vector_norm(values, ord=1, dim=1, dtype=_wide(values)) / values.shape[1]
    return (values.to(_wide(values)).abs() * mask).sum(1) / mask.sum(1)


def _l2(values: Tensor, mask: Tensor | None) -> Tensor:
    values = values if mask is None else values * mask
    return torch.linalg.vector_norm(values, dim=1, dtype=_wide(values))


def _wide(values: Tensor) -> torch.dtype:
    """At least float32: half precision overflows in sums."""
    return torch.promote_types(values.dtype, torch.float32)


def _var(values: Tensor, mask: Tensor | None) -> Tensor:
    values = values.to(_wide(values))
    if mask is None:
        return values.var(dim=1, correction=0)
    mean = (values * mask).sum(1) / mask.sum(1)
    return ((values - mean[:, None]) ** 2 * mask).sum(1) / mask.sum(1)


def _sum(values: Tensor, mask: Tensor | None) -> Tensor:
    return (values if mask is None else values * mask).sum(1, dtype=_wide(values))


def _each(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.flatten(0, 1) if mask is None else values[mask[..., 0] > 0]


# values [batch, seq, units], mask [batch, seq, 1] or None -> [batch, units]; [tokens, units] of `each`
OVER_SEQUENCE: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "mean": _mean,
    "l2": _l2,
    "var": _var,
    "sum": _sum,
    "each": _each,
}

# sums over rows of (1, |v|, v^2, v) -> [units]
OVER_BATCH: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda n, absolute, square, total: absolute / n,
    "l2": lambda n, absolute, square, total: square.sqrt(),
    "var": lambda n, absolute, square, total: square / n - (total / n) ** 2,
}


# scores [units, inside] -> [units]
OVER_INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda scores: scores.sum(-1),
    "l2": lambda scores: torch.linalg.vector_norm(scores, dim=-1),
}


class Aggregate:
    """Collects `[batch, seq, units]` and gives one score per unit.

    over_batch: `mean`, `l2` or `var`; over_sequence: one of these, `sum` or `each`. over_inside: for values
    `[batch, seq, units, inside]` that are aggregated channel by channel, what becomes of a unit's channels at the end:
    `sum` or `l2`. Raises `NestlingError` for anything else.
    """

    def __init__(self, over_batch: str = "l2", over_sequence: str = "mean", over_inside: str | None = None):
        self._finish = _known(OVER_BATCH, over_batch)
        self._row = _known(OVER_SEQUENCE, over_sequence)
        self._inside = _known(OVER_INSIDE, over_inside) if over_inside else None
        self._shape: tuple[int, ...] = ()
        self._sums: Tensor | None = None  # of (1, |v|, v^2, v) over rows [4, units (inside)]

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch of activations; mask `[batch, seq, 1]` is 0 where there is padding, None if there is none."""
        self._shape, values = values.shape[2:], values.flatten(2)
        if mask is not None:
            some = mask.sum((1, 2)) > 0  # a row of padding alone says nothing
            values, mask = values[some], mask[some]
        rows = self._row(values, mask).double()
        count = torch.full_like(rows.sum(0), len(rows))
        sums = torch.stack([count, rows.abs().sum(0), rows.square().sum(0), rows.sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums

    def merge(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Add up what all processes have collected; one that had nothing to add says so with zeros.

        shape: `(units,)`, or `(units, inside)` with over_inside.
        """
        self._shape = shape
        if self._sums is None:
            self._sums = torch.zeros(4, math.prod(shape), dtype=torch.float64, device=device)
        self._sums = processes.summed(self._sums)

    def score(self) -> Tensor:
        """One float64 score per unit `[units]`."""
        assert self._sums is not None, "nothing was added"
        scores = self._finish(*self._sums).cpu().view(self._shape)
        return scores if self._inside is None else self._inside(scores)


def _known(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise NestlingError(f"'{name}' is not an aggregation: choose from {', '.join(table)}")
    return table[name]
