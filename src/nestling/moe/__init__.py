"""Mixtures of experts: made from dense models and back, trained, pruned and merged."""

from nestling.moe.convert import mixture_config, split, to_dense, upcycle
from nestling.moe.merge import merge
from nestling.moe.routers import health
from nestling.moe.train import MixtureLM, MixtureSettings, loads, routed_modules, train

__all__ = [
    "MixtureLM",
    "MixtureSettings",
    "health",
    "loads",
    "merge",
    "mixture_config",
    "routed_modules",
    "split",
    "to_dense",
    "train",
    "upcycle",
]
