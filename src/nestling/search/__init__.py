"""Finding the shape for a budget."""

from nestling.budget import Budget
from nestling.search.candidate import Candidate, describe, token_loss
from nestling.search.evolve import evolve
from nestling.search.grid import candidates, reachable, shapes
from nestling.search.halving import Trial
from nestling.search.pick import pick
from nestling.search.space import Priced, Pricing, Space

__all__ = [
    "Budget",
    "Candidate",
    "Priced",
    "Pricing",
    "Space",
    "Trial",
    "candidates",
    "describe",
    "evolve",
    "pick",
    "reachable",
    "shapes",
    "token_loss",
]
