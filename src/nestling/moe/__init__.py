"""Mixtures of experts: made from dense models and back, trained, pruned and merged."""

from nestling.moe.convert import mixture_config, split, to_dense, upcycle

__all__ = ["mixture_config", "split", "to_dense", "upcycle"]
