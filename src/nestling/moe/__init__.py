"""Mixtures of experts: made from dense models and back, trained, pruned and merged."""

from nestling.moe.convert import mixture_config, split, upcycle
from nestling.moe.dense import check_dense, to_dense
from nestling.moe.ffn import sizes_of
from nestling.moe.merge import merge
from nestling.moe.routers import health
from nestling.moe.train import (
    MixtureLM,
    MixtureSettings,
    check_routed,
    fresh_scale,
    loads,
    routed_modules,
    scale_experts,
    train,
)

__all__ = [
    "MixtureLM",
    "MixtureSettings",
    "check_dense",
    "check_routed",
    "fresh_scale",
    "health",
    "loads",
    "merge",
    "mixture_config",
    "routed_modules",
    "scale_experts",
    "sizes_of",
    "split",
    "to_dense",
    "train",
    "upcycle",
]
