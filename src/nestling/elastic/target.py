"""Meeting a budget exactly: chances projected onto it while a router learns, and sizes that keep it at the end.

The paper adds |C / C_hat - 1| to the loss and hopes; budgets are missed wherever the router has settled before the
term has (see docs/elastic.md for how often). Here the budget is a constraint. `project` tilts all logits by one dual
variable mu,

    pi = softmax((z - mu * size / full) / tau)        mu such that C(E[sizes]) = C_hat,

which exists and is unique because cost rises with every size; gradients flow through mu too (implicit function
theorem), so a router only ever learns to move along the budget. `harden` takes decisions one by one, those that weigh
most first, projecting the rest anew after each, and moves single units to close what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestling.budget import LATENCY, Budget
from nestling.elastic.bill import Bill, Sizes
from nestling.elastic.space import PerChoice, PerRow, Space
from nestling.elastic.timed import Latency, Law, form_of
from nestling.errors import ShapeError, TargetError
from nestling.shape import fit

TOLERANCE = 0.01  # what a member may differ from its budget
CLOSE = 0.0025  # what ends the search for something closer
HARD_TAU = 0.05
MOST_MU = 1e5
EXACT = 1e-11  # of the budget, where the search for the dual variable ends
SNAP = 65  # how far a size moves for the config's sake
PAIRED = 24  # rows of which pairs are tried


@dataclass(frozen=True)
class Target:
    """A budget as one number: the largest of cost / limit, which is 1 where the budget is used up.

    name: as it was asked for. limits: metric -> most. latency: milliseconds of a form, where that is limited, and law,
    its stand-in for sizes that are only expected (see `on`).
    """

    name: str
    limits: Mapping[str, float]
    bill: Bill
    latency: Latency | None = None
    law: Law | None = None

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
            if limits[metric] >= whole:
                raise TargetError(
                    f"the budget {metric}={limit} is not below the parent's {whole:,.4g}: ask for less, such as 0.75x"
                )
        return cls(budget, limits, bill, latency)

    def on(self, space: Space) -> Target:
        """The target for choices of a space, in which latency has its law."""
        if LATENCY not in self.limits or self.latency is None:
            return self
        return replace(self, law=Law.of(space, self.bill, self.latency))

    def __call__(self, sizes: Sizes, gates: Tensor) -> Tensor:
        """The part of the budget that expected sizes use."""
        parts = [self._cost(metric, sizes, gates) / most for metric, most in self.limits.items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).max()

    def _cost(self, metric: str, sizes: Sizes, gates: Tensor) -> Tensor:
        return self.law(sizes, gates) if metric == LATENCY and self.law else self.bill(metric, sizes, gates)

    def of_sizes(self, space: Space, chosen: PerRow) -> float:
        """The part of the budget that chosen sizes `[rows]` use."""
        sizes, gates = space.exactly(chosen)
        used = [self.bill(m, sizes, gates).item() / most for m, most in self.limits.items() if m != LATENCY]
        if LATENCY in self.limits and self.latency is not None:
            used.append(self.latency(form_of(space, chosen)) / self.limits[LATENCY])
        return max(used)

    def check(self, space: Space) -> None:
        """Raises `TargetError` when even the smallest sizes cost more."""
        least = self.of_sizes(space, space.smallest())
        if least > 1:
            raise TargetError(
                f"no member can keep the budget {self.name}: the smallest sizes on offer still cost {least:.2f} of it"
            )


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


def harden(
    space: Space, target: Target, logits: PerChoice, at_most: PerRow | None = None, exact: bool = True
) -> dict[str, Tensor]:
    """Sizes `[rows]` on the budget that follow the logits as far as it allows.

    at_most: sizes of a larger member in which this one shall be nested. exact: also move single units off the lists.
    Raises `TargetError` when nothing within 1 % of the budget is found.
    """
    with torch.no_grad():
        at_most = dict(at_most or space.largest())
        open_ = {field: value.detach().double().clone() for field, value in logits.items()}
        for field, knob in space.knobs.items():
            _rule_out(open_[field], knob.sizes > at_most[field][:, None])
        for field, row in _by_weight(space, target):
            _decide(space, target, open_, field, row)
        picked = {field: value.argmax(-1, keepdim=True) for field, value in open_.items()}
        chosen = {f: knob.sizes.gather(1, picked[f]).flatten().long() for f, knob in space.knobs.items()}
        if exact:
            fill(space, target, chosen, at_most)
    return chosen


def _rule_out(logits: Tensor, where: Tensor) -> None:
    """No choice may be left without any: the smallest always stays."""
    where = where.clone()
    where[:, -1] = False
    logits[where] = -torch.inf


def _by_weight(space: Space, target: Target) -> list[tuple[str, int]]:
    """All decisions, those that move the cost most first."""
    full, weights = space.largest(), []
    for field, knob in space.knobs.items():
        for row in range(len(knob.rows)):
            values = full[field].clone()
            values[row] = int(knob.sizes[row, -1])
            weights.append((target.of_sizes(space, full | {field: values}), field, row))
    return [(field, row) for _, field, row in sorted(weights)]


def _decide(space: Space, target: Target, open_: dict[str, Tensor], field: str, row: int) -> None:
    """Leave one choice open in a row: the likeliest with which the others can still meet the budget."""
    chances = project(space, target, open_, HARD_TAU).chances[field][row]
    best, miss = -1, float("inf")
    for choice in chances.argsort(descending=True).tolist():
        if open_[field][row, choice] == -torch.inf:
            continue
        found = _miss(space, target, open_, field, row, choice)
        if found < miss:
            best, miss = choice, found
        if miss == 0:
            break
    keep = open_[field][row, best].clone()
    open_[field][row] = -torch.inf
    open_[field][row, best] = keep


def _miss(space: Space, target: Target, open_: dict[str, Tensor], field: str, row: int, choice: int) -> float:
    """How far from the budget the nearest sizes are, once a row has taken a choice; 0 if it is within reach."""
    most, least = {}, {}
    for name, knob in space.knobs.items():
        allowed = open_[name] > -torch.inf
        most[name] = torch.where(allowed, knob.sizes, -1).amax(-1)
        least[name] = torch.where(allowed, knob.sizes, torch.inf).amin(-1)
    for sizes in (most, least):
        sizes[field] = sizes[field].clone()
        sizes[field][row] = space.knobs[field].sizes[row, choice]
    top, bottom = target.of_sizes(space, most), target.of_sizes(space, least)
    return max(0.0, 1 - CLOSE - top, bottom - 1 - CLOSE)


def fill(
    space: Space,
    target: Target,
    chosen: dict[str, Tensor],
    at_most: PerRow | None = None,
    at_least: PerRow | None = None,
) -> None:
    """Move sizes by units until the budget is met; the move that leaves least, then the smallest in proportion.

    at_most, at_least: sizes not to go beyond, those on offer unless given. Raises `TargetError` as `harden` does.
    """
    most, least = dict(at_most or space.largest()), dict(at_least or space.smallest())
    _snap(space, target, chosen, most, least)
    for grain in (8, 4, 2, 1):
        while abs(target.of_sizes(space, chosen) - 1) > CLOSE:
            before = abs(target.of_sizes(space, chosen) - 1)
            moves = sorted(_moves(space, target, chosen, most, least, grain), key=lambda move: move[:2])
            taken = next((move for move in moves if move[0] < before - 1e-9 and _legal(space, chosen, *move[2:])), None)
            if taken is None:
                break
            chosen[taken[2]][taken[3]] = taken[4]
    if abs(target.of_sizes(space, chosen) - 1) > CLOSE:
        _fill_by_pairs(space, target, chosen, most, least)
    left = target.of_sizes(space, chosen) - 1
    if abs(left) > TOLERANCE:
        raise TargetError(
            f"the budget {target.name} falls between the sizes that this model can take: the nearest is {left:+.1%} "
            f"off, ask for that or allow more axes"
        )


def _snap(space: Space, target: Target, chosen: dict[str, Tensor], most: PerRow, least: PerRow) -> None:
    """Sizes that the config class refuses together: move one of those with one decision to the nearest it takes."""
    if _legal(space, chosen):
        return
    single = [field for field, knob in space.knobs.items() if len(knob.rows) == 1 and knob.letter is not None]
    for by in range(1, SNAP):
        for field in single:
            for size in (int(chosen[field]) - by, int(chosen[field]) + by):
                if int(least[field]) <= size <= int(most[field]) and _legal(space, chosen, field, 0, size):
                    chosen[field] = torch.tensor([size])
                    return
    raise TargetError(f"no sizes near {dict(space.shape(chosen))} are taken by the config: cut fewer axes")


def _fill_by_pairs(space: Space, target: Target, chosen: dict[str, Tensor], most: PerRow, least: PerRow) -> None:
    """Where no single move helps, for models of few and coarse units: one size a little off, and another to match."""
    best, pair = abs(target.of_sizes(space, chosen) - 1), None
    rows = [(field, row) for field, knob in space.knobs.items() for row in range(len(knob.rows))]
    for field, row in rows[:PAIRED]:
        for by in (-3, -2, -1, 1, 2, 3):
            size = int(chosen[field][row]) + by
            if not int(least[field][row]) <= size <= int(most[field][row]):
                continue
            moved = _with(chosen, field, row, size)
            for found in sorted(_moves(space, target, moved, most, least, 1), key=lambda found: found[:2])[:3]:
                if found[0] < best - 1e-9 and _legal(space, moved, *found[2:]):
                    best, pair = found[0], _with(moved, *found[2:])
    chosen.update(pair or {})


Move = tuple[float, float, str, int, int]


def _moves(space: Space, target: Target, chosen: PerRow, at_most: PerRow, at_least: PerRow, grain: int) -> list[Move]:
    """For every row the size that comes closest: (what is left of the gap, how much it moves, field, row, size)."""
    now, moves = target.of_sizes(space, chosen), []
    for field, knob in space.knobs.items():
        for row in range(len(knob.rows)):
            most, least, size = (int(sizes[field][row]) for sizes in (at_most, at_least, chosen))
            step = grain if size + grain <= most else -grain
            if grain >= most or size + step < 1:
                continue
            slope = (target.of_sizes(space, _with(chosen, field, row, size + step)) - now) / step
            if slope <= 0:
                continue
            units = round((1 - now) / slope / grain) * grain
            new = min(most, max(least, size + units))
            if new != size:
                left = abs(target.of_sizes(space, _with(chosen, field, row, new)) - 1)
                moves.append((max(left, CLOSE), abs(new / size - 1), field, row, new))
    return moves


def _with(chosen: PerRow, field: str, row: int, size: int) -> dict[str, Tensor]:
    values = chosen[field].clone()
    values[row] = size
    return {**chosen, field: values}


def _legal(space: Space, chosen: PerRow, field: str = "", row: int = 0, size: int = 0) -> bool:
    """Whether the config class takes these sizes, one of them changed if a field is named."""
    sizes = _with(chosen, field, row, size) if field else chosen
    try:
        fit(space.anatomy, space.shape(sizes), space.kept(sizes))
    except ShapeError:
        return False
    return True


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
