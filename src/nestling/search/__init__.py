"""Finding the shape for a budget."""

from nestling.budget import Budget
from nestling.search.grid import candidates
from nestling.search.pick import Candidate, describe, pick, token_loss

__all__ = ["Budget", "Candidate", "candidates", "describe", "pick", "token_loss"]
