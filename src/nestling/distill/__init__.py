"""Distillation: a pruned student learns again from its teacher (Minitron, arXiv 2407.14679, section 3)."""

from nestling.distill.cache import teacher_cache
from nestling.distill.correct import Together, corrected, leave
from nestling.distill.distill import distill
from nestling.distill.pair import Pair
from nestling.distill.settings import DistillSettings
from nestling.distill.states import STATE_LOSSES, STATES, state_loss
from nestling.train import DIVERGENCES, divergence
from nestling.train.kept import Cache

__all__ = [
    "DIVERGENCES",
    "STATES",
    "STATE_LOSSES",
    "Cache",
    "DistillSettings",
    "Pair",
    "Together",
    "corrected",
    "distill",
    "divergence",
    "leave",
    "state_loss",
    "teacher_cache",
]
