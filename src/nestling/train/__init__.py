"""What every training job shares: the loop, its losses and settings, rows in a fixed order, whole checkpoints."""

from nestling.train.causal import CausalLM
from nestling.train.divergences import DIVERGENCES, TopK, divergence, top_k
from nestling.train.fit import fit, recompute, recomputes
from nestling.train.learner import Learner, model_inputs, own_dtype
from nestling.train.losses import (
    CROSS_ENTROPY,
    IGNORE,
    Head,
    LogitLosses,
    Objective,
    Student,
    logit_losses,
    shared_losses,
)
from nestling.train.rows import Rows, collate, rows_of
from nestling.train.settings import (
    MICRO_TOKENS,
    MICRO_TOKENS_ELSEWHERE,
    Split,
    TrainSettings,
    documented,
    split_batch,
    training_arguments,
)
from nestling.train.trainer import LearnerTrainer

__all__ = [
    "CROSS_ENTROPY",
    "DIVERGENCES",
    "IGNORE",
    "MICRO_TOKENS",
    "MICRO_TOKENS_ELSEWHERE",
    "CausalLM",
    "Head",
    "Learner",
    "LearnerTrainer",
    "LogitLosses",
    "Objective",
    "Rows",
    "Split",
    "Student",
    "TopK",
    "TrainSettings",
    "collate",
    "divergence",
    "documented",
    "fit",
    "logit_losses",
    "model_inputs",
    "own_dtype",
    "recompute",
    "recomputes",
    "rows_of",
    "shared_losses",
    "split_batch",
    "top_k",
    "training_arguments",
]
