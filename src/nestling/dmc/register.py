"""Makes models with a compressed cache known to the auto classes; done when `nestling` is imported."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nestling.anatomy import ARCHITECTURES, per_layer
from nestling.dmc.runtime import modeling


def config_class(base: str) -> type[PreTrainedConfig]:
    """The config of `base` models with a compressed cache, whose layers may differ in size."""
    return modeling.config_class(base, cast(Any, per_layer.config_class(base)))


def model_class(base: str) -> type[PreTrainedModel]:
    """The causal language model for `config_class(base)`."""
    return modeling.model_class(base, cast(Any, per_layer.model_class(base)), cast(Any, config_class(base)))


def register() -> None:
    """Every declared architecture's compressed variant, model code being loaded on first use."""
    for base in ARCHITECTURES:
        config = config_class(base)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        deferred = per_layer.Deferred(f"NestlingDmc[{base}]", config, partial(model_class, base))
        AutoModelForCausalLM.register(config, cast(Any, deferred), exist_ok=True)
