"""Pretraining: from an architecture and text to a model, trained from scratch."""

from nestling.pretrain.architecture import PRESETS, architecture_config, build, names_checkpoint
from nestling.pretrain.pretrain import PretrainSettings, pretrain

__all__ = [
    "PRESETS",
    "PretrainSettings",
    "architecture_config",
    "build",
    "names_checkpoint",
    "pretrain",
]
