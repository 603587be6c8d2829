"""Sizes on a budget: what a router wishes for, as far as the budget allows, and then to the unit.

With V the sum of the wishes (logits) of the chosen sizes and C what they use of the budget, `harden` looks at all
choices near the budget where there are few; else at those that are best by V - mu C for some mu, row by row until none
changes, with mu halved in on the budget. Each of the most promising is brought onto the budget by single units, moved
where the wishes lose least, and the best is taken. The wish for a size that is not on the lists lies on a
straight line between its neighbours'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.elastic.prior import even
from nestling.elastic.space import PerChoice, PerRow, Space
from nestling.elastic.target import Target
from nestling.errors import TargetError
from nestling.shape import allows

TOLERANCE = 0.01  # what a member may differ from its budget
CLOSE = 0.0025  # what ends the search for something closer
HALVINGS = 12  # of the range of mu
NEAR = 0.25  # of the budget, how far off sizes may be that are filled up or cut back
TRIED = 6  # of them
EVERY = 8000  # choices that are all looked at, rather than the best for some mu
AT_ONCE = 1000  # of them
SWEEPS = 8
TIE = 1e-4  # part that the wish for evenness has, which decides where there is no other
MOST_MU = 1e9
SNAP = 65  # how far a size moves for the config's sake
PAIRED = 24  # rows of which pairs are tried


def harden(space: Space, target: Target, logits: PerChoice, at_most: PerRow | None = None) -> dict[str, Tensor]:
    """Sizes `[rows]` on the budget that follow the logits as far as it allows.

    at_most: sizes of a larger member in which this one shall be nested. Raises `TargetError`, which names the nearest
    budget that is met, when nothing within 1 % of this one is found.
    """
    most, missed = dict(at_most or space.largest()), []
    with torch.no_grad():
        tied = {field: TIE * value for field, value in even(space, target).items()}
        wishes = Wishes.of(space, {field: value - tied[field] for field, value in logits.items()})
        for group, pairs in _candidates(space, target, wishes, most):
            done = []
            for sizes in group:
                chosen = {field: value.clone() for field, value in sizes.items()}
                left = _moved(space, target, chosen, most, space.smallest(), wishes, pairs)
                if left is not None and abs(left) <= TOLERANCE:
                    done.append(chosen)
                elif left is not None:
                    missed += [chosen, sizes]
            if done:
                return max(done, key=wishes)
    raise _between_sizes(space, target, missed)


def check(space: Space, target: Target) -> None:
    """Raises `TargetError`, which names the least that can be asked for, when even the smallest sizes cost more."""
    least = space.smallest()
    if target.of_sizes(space, least) > 1:
        _snap(space, least, space.largest(), least)
        more = ", or allow more axes" if len(space.knobs) <= len(space.anatomy.axes) else ""
        raise TargetError(
            f"no member can keep the budget {target.name}: the smallest sizes on offer come to "
            f"{target.met_by(space, least)}, ask for at least that{more}"
        )


def _candidates(
    space: Space, target: Target, wishes: Wishes, most: PerRow
) -> Iterator[tuple[list[dict[str, Tensor]], bool]]:
    """Groups of listed sizes to bring onto the budget, and whether by pairs of moves too; one that works is enough.

    The most promising by the wishes; the same one by one, with pairs; and those near the same part of every axis.
    """
    found = [*itertools.islice(_near(space, target, wishes, most), TRIED)]
    yield found, False
    yield from (([sizes], True) for sizes in found)
    evenly = Wishes.of(space, {field: -value for field, value in even(space, target).items()})
    yield from (([sizes], True) for sizes in _near(space, target, evenly, most))


def _between_sizes(space: Space, target: Target, seen: Sequence[PerRow]) -> TargetError:
    """A refusal that names the nearest budget that some sizes meet."""
    parent = _key(space.largest())
    taken = [sizes for sizes in seen if _key(sizes) != parent and _legal(space, sizes)]
    if not taken:
        return TargetError(f"no sizes near the budget {target.name} are taken by the config: allow more axes")
    nearest = min(taken, key=lambda sizes: abs(target.of_sizes(space, sizes) - 1))
    return TargetError(
        f"the budget {target.name} falls between the sizes that this model can take: the nearest that is met is "
        f"{target.met_by(space, nearest)}, ask for that or allow more axes"
    )


@dataclass(frozen=True)
class Wishes:
    """Logits `[rows, choices]` of each knob as a function of its sizes, listed or not."""

    sizes: PerChoice
    logits: PerChoice

    @classmethod
    def of(cls, space: Space, logits: PerChoice) -> Wishes:
        return cls({f: knob.sizes for f, knob in space.knobs.items()}, {f: v.double() for f, v in logits.items()})

    def __call__(self, chosen: PerRow) -> float:
        """The sum over all rows."""
        return sum(self.of_size(f, row, int(size)) for f, sizes in chosen.items() for row, size in enumerate(sizes))

    def of_listed(self, flat: Tensor) -> Tensor:
        """The same for many choices of listed sizes `[shapes, all rows]`: `[shapes]`."""
        total, start = torch.zeros(len(flat), dtype=torch.float64), 0
        for field, sizes in self.sizes.items():
            for row, listed in enumerate(sizes):
                place = (listed > flat[:, start + row, None]).sum(-1)
                total += self.logits[field][row, place]
            start += len(sizes)
        return total

    def of_size(self, field: str, row: int, size: int) -> float:
        """Between two listed sizes, the line between their logits; outside them, the nearest one's."""
        sizes, logits = self.sizes[field][row], self.logits[field][row]
        below = int((sizes > size).sum())  # the first listed that is not larger
        if below == 0 or below == len(sizes):
            return logits[min(below, len(sizes) - 1)].item()
        part = (sizes[below - 1] - size) / (sizes[below - 1] - sizes[below])
        return (logits[below - 1] + part * (logits[below] - logits[below - 1])).item()


def _near(space: Space, target: Target, wishes: Wishes, most: PerRow) -> Iterator[dict[str, Tensor]]:
    """Listed sizes near the budget, best first by the wishes they can be hoped to have once they are on it."""
    lists = [
        _allowed(sizes, float(limit)).long().tolist()
        for field, knob in space.knobs.items()
        for sizes, limit in zip(knob.sizes, most[field], strict=True)
    ]
    few = math.prod(map(len, lists)) <= EVERY
    flat = torch.tensor([*itertools.product(*lists)]) if few else _by_halving(space, target, wishes, most)
    costs = torch.cat([target(*space.exactly_flat(part)) for part in flat.split(AT_ONCE)])
    values = wishes.of_listed(flat)
    mu = _halved_in(lambda mu: costs[(values - mu * costs).argmax()].item() - 1)
    far = (costs - 1).abs()
    order = (values - mu * (costs - 1)).argsort(descending=True).tolist()
    yield from (space.by_knob(flat[i]) for i in order if far[i] <= max(NEAR, far.min().item()))


def _by_halving(space: Space, target: Target, wishes: Wishes, most: PerRow) -> Tensor:
    """Sizes `[shapes, all rows]` best for some mu, with mu halved in on the budget, and those a place beside them."""
    seen: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def over(mu: float, start: PerRow) -> float:
        chosen = _best(space, target, wishes, most, mu, start)
        cost = target(*space.exactly(chosen)).item()
        if abs(cost - 1) <= NEAR:
            seen.update({_key(other): other for other in _beside(space, chosen, most)})
        seen[_key(chosen)] = chosen
        return cost - 1

    for start in (_within(space, most), space.smallest()):
        _halved_in(lambda mu, start=start: over(mu, start))  # type: ignore[misc]
    return torch.stack([space.flat(sizes) for sizes in seen.values()])


def _key(chosen: PerRow) -> tuple[int, ...]:
    return tuple(torch.cat([*chosen.values()]).tolist())


def _beside(space: Space, chosen: PerRow, most: PerRow) -> Iterator[dict[str, Tensor]]:
    """Sizes that differ in one row, by one place on its list."""
    for field, row in _rows(space):
        allowed = _allowed(space.knobs[field].sizes[row], float(most[field][row])).long().tolist()
        place = allowed.index(int(chosen[field][row]))
        for other in (place - 1, place + 1):
            if 0 <= other < len(allowed):
                yield _with(chosen, field, row, allowed[other])


def _halved_in(over: Callable[[float], float]) -> float:
    """Where a falling function of mu passes 0, to `HALVINGS` halvings of a range grown around 0."""
    step = 1.0 if over(0.0) > 0 else -1.0
    low = 0.0
    while over(step) * step > 0 and abs(step) < MOST_MU:
        low, step = step, 4 * step
    low, high = sorted((low, step))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) > 0 else (low, middle)
    return (low + high) / 2


def _best(space: Space, target: Target, wishes: Wishes, most: PerRow, mu: float, start: PerRow) -> dict[str, Tensor]:
    """Listed sizes from which no change of one row gains in V - mu C."""
    flat = space.flat(start).clone()
    rows = [(f, row, _allowed(space.knobs[f].sizes[row], int(most[f][row])).long()) for f, row in _rows(space)]
    for _ in range(SWEEPS):
        before = flat.clone()
        for place, (field, row, allowed) in enumerate(rows):
            lines = flat.repeat(len(allowed), 1)
            lines[:, place] = allowed
            costs = target(*space.exactly_flat(lines))
            flat[place] = allowed[(wishes.logits[field][row, -len(allowed) :] - mu * costs).argmax()]
        if torch.equal(flat, before):
            break
    return space.by_knob(flat)


def _allowed(sizes: Tensor, most: float) -> Tensor:
    """The listed sizes up to one; the smallest always."""
    return sizes[min(int((sizes > most).sum()), len(sizes) - 1) :]


def _within(space: Space, most: PerRow) -> dict[str, Tensor]:
    """The largest listed sizes up to given ones."""
    return {
        field: torch.stack(
            [_allowed(sizes, int(limit))[0] for sizes, limit in zip(knob.sizes, most[field], strict=True)]
        ).long()
        for field, knob in space.knobs.items()
    }


def _lines(space: Space, chosen: PerRow, changes: Sequence[tuple[str, int, int]]) -> Tensor:
    """Chosen sizes with one of them changed, for each change: `[changes, all rows]`."""
    lengths = (len(knob.rows) for knob in space.knobs.values())
    starts = dict(zip(space.knobs, itertools.accumulate(lengths, initial=0), strict=False))
    flat = space.flat(chosen).repeat(len(changes), 1)
    for line, (field, row, size) in zip(flat, changes, strict=True):
        line[starts[field] + row] = size
    return flat


def fill(space: Space, target: Target, chosen: dict[str, Tensor], at_most: PerRow, at_least: PerRow) -> None:
    """Move sizes by units, between two others, until the budget is met. Raises `TargetError` as `harden` does."""
    left = _moved(space, target, chosen, at_most, at_least)
    if left is None or abs(left) > TOLERANCE:
        raise _between_sizes(space, target, [] if left is None else [chosen])


def _moved(
    space: Space,
    target: Target,
    chosen: dict[str, Tensor],
    most: PerRow,
    least: PerRow,
    wishes: Wishes | None = None,
    pairs: bool = True,
) -> float | None:
    """Move sizes by units: the move that leaves least of the gap, of equals that with the least loss.

    Returns what is left of the gap as a part of the budget; None if the config takes no sizes near these. wishes: what
    a move loses by; its size in proportion unless given. pairs: also move two sizes at once where no single move helps.
    """
    if not _snap(space, chosen, most, least):
        return None
    for grain in (8, 4, 2, 1):
        while abs(target.of_sizes(space, chosen) - 1) > CLOSE:
            before = abs(target.of_sizes(space, chosen) - 1)
            moves = sorted(_moves(space, target, chosen, most, least, grain, wishes), key=lambda move: move[:2])
            taken = next((move for move in moves if move[0] < before - 1e-9 and _legal(space, chosen, *move[2:])), None)
            if taken is None:
                break
            chosen[taken[2]][taken[3]] = taken[4]
    if pairs and abs(target.of_sizes(space, chosen) - 1) > CLOSE:
        _fill_by_pairs(space, target, chosen, most, least)
    return target.of_sizes(space, chosen) - 1


def _snap(space: Space, chosen: dict[str, Tensor], most: PerRow, least: PerRow) -> bool:
    """Whether the config class takes these sizes, or with one that has one decision moved to the nearest it takes."""
    if _legal(space, chosen):
        return True
    single = [field for field, knob in space.knobs.items() if len(knob.rows) == 1 and knob.letter is not None]
    for by in range(1, SNAP):
        for field in single:
            for size in (int(chosen[field]) - by, int(chosen[field]) + by):
                if int(least[field]) <= size <= int(most[field]) and _legal(space, chosen, field, 0, size):
                    chosen[field] = torch.tensor([size])
                    return True
    return False


def _fill_by_pairs(space: Space, target: Target, chosen: dict[str, Tensor], most: PerRow, least: PerRow) -> None:
    """Where no single move helps, for models of few and coarse units: one size a little off, and another to match."""
    best, pair = abs(target.of_sizes(space, chosen) - 1), None
    for field, row in itertools.islice(_rows(space), PAIRED):
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


def _moves(
    space: Space,
    target: Target,
    chosen: PerRow,
    at_most: PerRow,
    at_least: PerRow,
    grain: int,
    wishes: Wishes | None = None,
) -> list[Move]:
    """For every row the size that comes closest: (what is left of the gap, what it loses, field, row, size)."""
    now, steps = target.of_sizes(space, chosen), []
    for field, row in _rows(space):
        most, size = int(at_most[field][row]), int(chosen[field][row])
        step = grain if size + grain <= most else -grain
        if grain < most and size + step >= 1:
            steps.append((field, row, size + step))
    if not steps:
        return []
    moves = []
    for (field, row, to), used in zip(steps, target.of_many(space, _lines(space, chosen, steps)).tolist(), strict=True):
        size = int(chosen[field][row])
        slope = (used - now) / (to - size)
        if slope > 0:
            units = round((1 - now) / slope / grain) * grain
            new = min(int(at_most[field][row]), max(int(at_least[field][row]), size + units))
            moves += [(field, row, new)] if new != size else []
    if not moves:
        return []
    left = (target.of_many(space, _lines(space, chosen, moves)) - 1).abs().tolist()
    return [(max(off, CLOSE), _lost(chosen, wishes, *move), *move) for off, move in zip(left, moves, strict=True)]


def _lost(chosen: PerRow, wishes: Wishes | None, field: str, row: int, new: int) -> float:
    """What a move loses by the wishes; without any, its size in proportion."""
    size = int(chosen[field][row])
    return abs(new / size - 1) if wishes is None else wishes.of_size(field, row, size) - wishes.of_size(field, row, new)


def _rows(space: Space) -> Iterator[tuple[str, int]]:
    return ((field, row) for field, knob in space.knobs.items() for row in range(len(knob.rows)))


def _with(chosen: PerRow, field: str, row: int, size: int) -> dict[str, Tensor]:
    values = chosen[field].clone()
    values[row] = size
    return {**chosen, field: values}


def _legal(space: Space, chosen: PerRow, field: str = "", row: int = 0, size: int = 0) -> bool:
    """Whether the config class takes these sizes, one of them changed if a field is named."""
    sizes = _with(chosen, field, row, size) if field else chosen
    return allows(space.anatomy, space.shape(sizes), space.kept(sizes))
