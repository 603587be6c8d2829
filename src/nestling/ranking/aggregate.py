"""Running aggregates of activations: one number per unit from any number of tokens, in memory for one number.

Minitron's scores reduce over the sequence first, then over the batch (arXiv 2407.14679, section 2.2 and table 11):

    mean = 1/n sum |s|        l2 = sqrt(sum s^2)        var = 1/n sum (s - mean s)^2

Rows are added up in float64 and the batch step is taken once at the end, so that neither the order of the batches
nor their size matters, nor which process saw them. Padding is left out of every sum.
"""

from __future__ import annotations

from collections.abc import Callable

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


# values [batch, seq, units], mask [batch, seq, 1] or None -> [batch, units]
OVER_SEQUENCE: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"mean": _mean, "l2": _l2, "var": _var}

# sums over rows of (1, |v|, v^2, v) -> [units]
OVER_BATCH: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda n, absolute, square, total: absolute / n,
    "l2": lambda n, absolute, square, total: square.sqrt(),
    "var": lambda n, absolute, square, total: square / n - (total / n) ** 2,
}


class Aggregate:
    """Collects `[batch, seq, units]` and gives one score per unit.

    over_batch, over_sequence: `mean`, `l2` or `var`. Raises `NestlingError` for anything else.
    """

    def __init__(self, over_batch: str = "l2", over_sequence: str = "mean"):
        for name in (over_batch, over_sequence):
            if name not in OVER_BATCH:
                raise NestlingError(f"'{name}' is not an aggregation: choose from {', '.join(OVER_BATCH)}")
        self._row = OVER_SEQUENCE[over_sequence]
        self._finish = OVER_BATCH[over_batch]
        self._sums: Tensor | None = None  # of (1, |v|, v^2, v) over rows [4, units]

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Add one batch of activations; mask `[batch, seq, 1]` is 0 where there is padding, None if there is none."""
        rows = self._row(values, mask).double()
        if mask is not None:
            rows = rows[mask.sum((1, 2)) > 0]  # a row of padding alone says nothing
        count = torch.full_like(rows.sum(0), len(rows))
        sums = torch.stack([count, rows.abs().sum(0), rows.square().sum(0), rows.sum(0)])
        self._sums = sums if self._sums is None else self._sums + sums

    def merge(self, units: int, device: torch.device) -> None:
        """Add up what all processes have collected; one that had nothing to add says so with zeros."""
        if self._sums is None:
            self._sums = torch.zeros(4, units, dtype=torch.float64, device=device)
        self._sums = processes.summed(self._sums)

    def score(self) -> Tensor:
        """One float64 score per unit `[units]`."""
        assert self._sums is not None, "nothing was added"
        return self._finish(*self._sums).cpu()
