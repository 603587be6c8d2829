"""Evolution over a space of sizes that is too large to go through.

Individuals are the sizes of the axes that do not fill; the filling size follows from the budget, so every individual
keeps it. Parents are drawn by tournament, children take each size from either parent and mutate to a neighbouring size,
and the best survive. The same seed gives the same result, so an interrupted search repeats nothing but arithmetic.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from nestling.search.space import Priced, Sizes, Space
from nestling.shape import Shape

POPULATION = 128
GENERATIONS = 40
MUTATION = 0.25  # of each size of a child
TOURNAMENT = 3
FAR = 0.2  # of mutations go to any size rather than to a neighbouring one


def evolve(
    space: Space,
    fitness: Callable[[Shape], float],
    seed: int = 0,
    population: int = POPULATION,
    generations: int = GENERATIONS,
) -> list[Priced]:
    """The last generation and everything better than its worst, fittest (lowest) first.

    fitness: of a shape that keeps the budget, lower is better; asked once for each.
    """
    rng = random.Random(seed)
    scores: dict[Sizes, tuple[float, Priced | None]] = {}

    def score(sizes: Sizes) -> float:
        if sizes not in scores:
            priced = space.largest(sizes)
            scores[sizes] = (fitness(priced[0]) if priced else math.inf, priced)
        return scores[sizes][0]

    # The two ends are in, so that a budget that only the smallest sizes keep has a first generation.
    ends = [tuple(sizes[end] for sizes in space.options.values()) for end in (0, -1)]
    living = ends + [tuple(rng.choice(sizes) for sizes in space.options.values()) for _ in range(population)]
    living = sorted(dict.fromkeys(living), key=score)[:population]
    for _ in range(generations):
        children = [_child(space, _chosen(living, rng), _chosen(living, rng), rng) for _ in range(population)]
        living = sorted(dict.fromkeys(living + children), key=score)[:population]
    return [priced for sizes in living if (priced := scores[sizes][1]) is not None]


def _chosen(living: list[Sizes], rng: random.Random) -> Sizes:
    """The fittest of a few drawn at random; `living` is sorted, fittest first."""
    return living[min(rng.randrange(len(living)) for _ in range(TOURNAMENT))]


def _child(space: Space, one: Sizes, other: Sizes, rng: random.Random) -> Sizes:
    sizes = []
    for options, pair in zip(space.options.values(), zip(one, other, strict=True), strict=True):
        size = rng.choice(pair)
        if rng.random() < MUTATION:
            size = rng.choice(options) if rng.random() < FAR else _neighbour(options, size, rng)
        sizes.append(size)
    return tuple(sizes)


def _neighbour(options: list[int], size: int, rng: random.Random) -> int:
    place = options.index(size) + rng.choice((-1, 1))
    return options[min(max(place, 0), len(options) - 1)]
