"""Training from scratch against a child: longer and longer runs until one reaches the child's held-out loss.

Each length is a run of its own with a whole learning-rate schedule, so the tokens that reach the loss are read off
between the last two, in log tokens, and never extrapolated. Knows neither models nor texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

Run = tuple[int, float]  # tokens, held-out loss


def reach(goal: float, lengths: Sequence[int], loss_after: Callable[[int], float]) -> list[Run]:
    """Runs of these lengths, up to the first that ends at the goal or below."""
    runs: list[Run] = []
    for tokens in sorted(lengths):
        runs.append((tokens, loss_after(tokens)))
        if runs[-1][1] <= goal:
            break
    return runs


def tokens_to(goal: float, runs: Sequence[Run]) -> tuple[float, bool]:
    """Tokens at which the loss is the goal, between two runs; without such two the nearest run, and False."""
    runs = sorted(runs)
    for (few, before), (many, after) in pairwise(runs):
        if after <= goal < before:
            part = (before - goal) / (before - after)
            return math.exp(math.log(few) + part * (math.log(many) - math.log(few))), True
    return float(runs[-1][0] if runs[-1][1] > goal else runs[0][0]), False
