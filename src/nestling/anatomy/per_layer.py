"""Models whose layers differ in size: stock layers, each built from a config of its own.

For every declared architecture there is a config class `nestling_<type>` that adds `layer_shapes` (config field ->
one value per layer), and a model class whose layers are the stock layer class given a view of the config with that
layer's values. Nothing else differs, so attention kernels, caches and `generate` work as they are. Both are
registered with the auto classes when `nestling` is imported; model code is loaded on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from nestling.anatomy.declare import ARCHITECTURES
from nestling.errors import ShapeError

PREFIX = "nestling_"


class LayerConfig:
    """A config as one layer sees it: that layer's sizes in front of the model's config."""

    def __init__(self, config: PreTrainedConfig, sizes: dict[str, int]):
        names = [(name, other) for pair in config.attribute_map.items() for name, other in (pair, pair[::-1])]
        aliases = {name: sizes[other] for name, other in names if other in sizes}  # a size may go by two names
        self.__dict__.update(_config=config, **aliases, **sizes)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


@lru_cache
def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The per-layer config class of an architecture: its stock config and `layer_shapes`."""
    stock = CONFIG_MAPPING[model_type]
    members = {
        "model_type": PREFIX + model_type,
        "base_model_type": model_type,
        "layer_shapes": None,
        "__module__": __name__,
        "__doc__": f"{stock.__name__} with `layer_shapes`: a list with one value per layer for each field in it.",
    }
    return type(f"Nestling{stock.__name__}", (stock,), members)


@lru_cache
def model_class(model_type: str) -> type[PreTrainedModel]:
    """The causal language model for `config_class(model_type)`."""
    stock = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]])
    path = ARCHITECTURES[model_type].layers

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        super(model_class(model_type), self).__init__(config)
        layers = cast(nn.ModuleList, self.get_submodule(path))
        for i, layer in enumerate(layers):
            layers[i] = _made_anew(layer, config, i)
        self.post_init()

    members = {
        "__init__": __init__,
        "config_class": config_class(model_type),
        # transformers reads this off the source of the class's module, which is this one
        "_can_set_experts_implementation": classmethod(lambda cls: stock._can_set_experts_implementation()),
        # All code that makes weights is transformers': without this it leaves out buffers that the model makes.
        "is_custom_code": classmethod(lambda cls: False),
        "__module__": __name__,
        "__doc__": f"{stock.__name__} whose layers have the sizes in `config.layer_shapes`.",
    }
    return type(f"Nestling{stock.__name__}", (stock,), members)


def layer_config(config: PreTrainedConfig, layer: int) -> LayerConfig:
    """The config as one layer sees it, what follows from its sizes included.

    Raises `ShapeError` when the layer's sizes leave no value for a field that follows from them.
    """
    sizes = {field: values[layer] for field, values in (config.layer_shapes or {}).items()}
    seen = LayerConfig(config, sizes)
    for field, derive in ARCHITECTURES[config.base_model_type].derived.items():
        value = derive(seen)
        if value is None:
            raise ShapeError(f"layer {layer} needs {field} to be a whole number, which its sizes do not give")
        seen.__dict__[field] = value
    return seen


def _made_anew(layer: nn.Module, config: PreTrainedConfig, number: int) -> nn.Module:
    """A layer of the same class with other sizes; buffers that the model gave it go along."""
    more = ARCHITECTURES[config.base_model_type].layer_arguments
    made = cast(Any, type(layer))(layer_config(config, number), number, *(more(config, number) if more else ()))
    own = {name for name, _ in made.named_buffers()}
    for name, buffer in layer.named_buffers():
        if name not in own:
            module, _, last = name.rpartition(".")
            made.get_submodule(module).register_buffer(last, buffer, persistent=False)
    return made


class Deferred:
    """Stands for a model class in the auto classes until `make` makes it, so that importing nestling stays quick."""

    def __init__(self, name: str, config: type[PreTrainedConfig], make: Callable[[], type[PreTrainedModel]]):
        self.__name__ = name
        self.config_class = config
        self._make = make

    def __getattr__(self, name: str) -> Any:
        if name == "_make":
            raise AttributeError(name)
        return getattr(self._make(), name)


def register_per_layer() -> None:
    """Make every declared architecture's per-layer variant known to `AutoConfig` and `AutoModelForCausalLM`."""
    for model_type in ARCHITECTURES:
        config = config_class(model_type)
        AutoConfig.register(PREFIX + model_type, config, exist_ok=True)
        deferred = Deferred(f"Nestling[{model_type}]", config, partial(model_class, model_type))
        AutoModelForCausalLM.register(config, cast(Any, deferred), exist_ok=True)
