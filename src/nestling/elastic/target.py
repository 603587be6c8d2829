"""Meeting a budget exactly: chances projected onto it while a router learns, and sizes that keep it at the end.

The paper adds |C / C_hat - 1| to the loss and hopes; budgets are missed wherever the router has settled before the
term has (see docs/elastic.md for how often). Here the budget is a constraint. `project` tilts all logits by one dual
variable mu,

    pi = softmax((z - mu * w * size / full) / tau)    mu such that C(E[sizes]) = C_hat,

which exists and is unique because cost rises with every size; w is what a row weighs in the cost (`Target.tilt`), so
that what costs little is not cut first. Gradients flow through mu too (implicit function theorem), so a router only
ever learns to move along the budget. Sizes at the end are found by `nestling.elastic.harden`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.budget import LATENCY, Budget, Limit
from nestling.elastic.bill import Bill, Sizes
from nestling.elastic.space import PerChoice, PerRow, Space
from nestling.elastic.timed import Latency, Law, form_of
from nestling.errors import TargetError
from nestling.shape import fit

MOST_MU = 1e5
EXACT = 1e-11  # of the budget, where the search for the dual variable ends


@dataclass(frozen=True)
class Target:
    """A budget as one number: the largest of cost / limit, which is 1 where the budget is used up.

    name: as it was asked for. limits: metric -> most. latency: milliseconds of a form, where that is limited, and law,
    its stand-in for sizes that are only expected (see `on`). tilt: what each row weighs in the cost, 1 for the heaviest
    `[all rows, 1]`; all the same unless given.
    """

    name: str
    limits: Mapping[str, float]
    bill: Bill
    latency: Latency | None = None
    law: Law | None = None
    tilt: Tensor | None = None

    @classmethod
    def of(cls, budget: str, bill: Bill, latency: Latency | None = None) -> Target:
        """Raises `TargetError` for a text that is no budget, one above the parent, or one that sizes do not tell."""
        sizes, gates = bill.whole()
        limits = {}
        for metric, limit in Budget.parse(budget).limits.items():
            if metric != LATENCY:
                whole = bill(metric, sizes, gates).item()
            elif latency is None:
                raise TargetError(f"the budget {budget} needs times measured here: pass latency=, or leave it out")
            else:
                whole = latency(fit(bill.anatomy, {}, check_config=False))
            limits[metric] = limit.of(whole)
            if not whole:
                raise TargetError(f"the parent has no {metric.removesuffix('_bytes')} to limit: leave {metric} out")
            if limits[metric] >= whole:
                shown = f"{whole:,.{0 if whole >= 100 else 2}f}"
                raise TargetError(
                    f"the budget {metric}={limit} is not below the parent's {shown}: ask for less, such as 0.75x"
                )
        return cls(budget, limits, bill, latency)

    def on(self, space: Space) -> Target:
        """The target for choices of a space: rows have their weights in it, and latency its law."""
        timed = LATENCY in self.limits and self.latency is not None
        target = replace(self, law=Law.of(space, self.bill, self.latency)) if timed else self  # type: ignore[arg-type]
        return replace(target, tilt=_tilt(space, target))

    def __call__(self, sizes: Sizes, gates: Tensor) -> Tensor:
        """The part of the budget that expected sizes use `[...]`."""
        parts = [self._cost(metric, sizes, gates) / most for metric, most in self.limits.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).amax(0)

    def _cost(self, metric: str, sizes: Sizes, gates: Tensor) -> Tensor:
        return self.law(sizes, gates) if metric == LATENCY and self.law else self.bill(metric, sizes, gates)

    def of_sizes(self, space: Space, chosen: PerRow) -> float:
        """The part of the budget that chosen sizes `[rows]` use."""
        return self.of_many(space, space.flat(chosen)[None]).item()

    def of_many(self, space: Space, flat: Tensor) -> Tensor:
        """The same for the sizes of many shapes `[shapes, all rows]`: `[shapes]`."""
        return torch.stack([cost / self.limits[metric] for metric, cost in self._costs(space, flat).items()]).amax(0)

    def met_by(self, space: Space, chosen: PerRow) -> str:
        """The budget that chosen sizes `[rows]` use up, as `--to` has it: what they exceed and the tightest differ."""
        costs = self._costs(space, space.flat(chosen)[None])
        used = {metric: cost.item() / self.limits[metric] for metric, cost in costs.items()}
        most, limits = max(used.values()), {}
        for metric, limit in Budget.parse(self.name).limits.items():
            part = used[metric] if used[metric] > 1 or used[metric] == most else 1.0
            limits[metric] = Limit(_rounded_up(limit.value * part), limit.relative)
        return str(Budget(limits))

    def _costs(self, space: Space, flat: Tensor) -> dict[str, Tensor]:
        sizes, gates = space.exactly_flat(flat)
        costs = {metric: self.bill(metric, sizes, gates) for metric in self.limits if metric != LATENCY}
        if LATENCY in self.limits and self.latency is not None:
            times = [self.latency(form_of(space, space.by_knob(line))) for line in flat]
            costs[LATENCY] = torch.tensor(times, dtype=torch.float64)
        return costs


def _rounded_up(value: float) -> float:
    """To four digits, so that a limit is not below what it was made of."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return float(f"{math.ceil(value / unit * (1 - 1e-12)) * unit:.4g}")


@dataclass(frozen=True)
class Projection:
    """Chances `[rows, choices]` for each knob, and the dual variable that put them on the budget."""

    chances: dict[str, Tensor]
    mu: float


def project(space: Space, target: Target, logits: PerChoice, tau: float) -> Projection:
    """Chances on the budget, differentiable in the logits `[rows, choices]`; -inf rules a choice out.

    Where the budget is out of reach, the nearest chances.
    """
    flat, shares = space.pack(logits), space.flat_sizes / space.flat_sizes[:, :1]
    shares = shares if target.tilt is None else shares * target.tilt

    def chances(mu: Tensor | float) -> Tensor:
        return torch.softmax((flat - mu * shares) / tau, dim=-1)

    with torch.no_grad():
        mu = _root(lambda value: target(*space.expected_flat(chances(value))).item() - 1)
    dual = torch.tensor(mu, dtype=torch.float64)
    if flat.requires_grad and torch.is_grad_enabled():
        leaf = dual.clone().requires_grad_()
        cost = target(*space.expected_flat(chances(leaf)))
        (slope,) = torch.autograd.grad(cost, leaf, retain_graph=True)
        if slope.abs() > 1e-9:  # d mu / d z = - (dC / dz) / (dC / d mu); the leaf itself asks for nothing
            dual = dual - (cost - cost.detach()) / slope
    return Projection(space.unpack(chances(dual)), mu)


def _tilt(space: Space, target: Target) -> Tensor:
    """What each row adds to the cost per part of its size, all others whole; the heaviest is 1: `[all rows, 1]`."""
    full, weights = space.largest(), []
    most = target(*space.exactly(full))
    for field, knob in space.knobs.items():
        for row, sizes in enumerate(knob.sizes):
            values = full[field].clone()
            values[row] = int(sizes[-1])
            saved = most - target(*space.exactly(full | {field: values}))
            weights.append(saved / (1 - sizes[-1] / sizes[0]))
    found = torch.stack(weights)[:, None].clamp(min=0)
    return found / found.max().clamp(min=1e-30)


def _root(function: Callable[[float], float]) -> float:
    """Where a falling function is 0: a bracket grown around 0, then secant steps that keep it (the Illinois rule)."""
    low = high = step = 0.0
    at_low = at_high = function(0.0)
    while at_low < 0 and low > -MOST_MU:
        step = 4 * step or 1.0
        low, at_low, high, at_high = low - step, function(low - step), low, at_low
    while at_high > 0 and high < MOST_MU:
        step = 4 * step or 1.0
        low, at_low, high, at_high = high, at_high, high + step, function(high + step)
    if at_low < 0 or at_high > 0:  # out of reach
        return low if at_low < 0 else high
    weight_low, weight_high, last = at_low, at_high, None
    for _ in range(100):
        if min(abs(at_low), abs(at_high)) < EXACT or high - low < 1e-14 * max(1.0, abs(high)):
            break
        middle = low + (high - low) * weight_low / (weight_low - weight_high)
        if not low < middle < high:
            middle = (low + high) / 2
        value = function(middle)
        above = value > 0
        if above:
            low, at_low, weight_low = middle, value, value
            weight_high = weight_high / 2 if above is last else weight_high
        else:
            high, at_high, weight_high = middle, value, value
            weight_low = weight_low / 2 if above is last else weight_low
        last = above
    return low if abs(at_low) <= abs(at_high) else high
