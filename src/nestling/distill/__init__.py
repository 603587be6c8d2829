"""Distillation: a pruned student learns again from its teacher (Minitron, arXiv 2407.14679, section 3)."""

from nestling.distill.distill import distill
from nestling.distill.losses import DIVERGENCES, Head, LogitLosses, Objective, divergence, logit_losses
from nestling.distill.pair import Pair
from nestling.distill.settings import DistillSettings
from nestling.distill.states import STATE_LOSSES, STATES, state_loss
from nestling.distill.trainer import DistillTrainer

__all__ = [
    "DIVERGENCES",
    "STATES",
    "STATE_LOSSES",
    "DistillSettings",
    "DistillTrainer",
    "Head",
    "LogitLosses",
    "Objective",
    "Pair",
    "distill",
    "divergence",
    "logit_losses",
    "state_loss",
]
