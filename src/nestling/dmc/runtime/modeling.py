"""Stock models with a compressed cache: their config and model classes, and how attention is handed over.

Nothing of a stock model is rewritten. Before an attention module runs, a hook takes its rotary embedding and its cache
away (it is given a rotation by zero and no cache), and its config names an attention function of ours; so the stock
code projects, norms and splits heads, and hands over queries, keys and values that are not rotated. The module's own
rotation is applied when slots are made. A hook before the decoder notes which tokens are real and which part documents.
Any `DynamicCache` becomes a compressed one at its first use, so `generate`, pipelines and streaming work as they are.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .attend import attention
from .gates import Gates
from .heads import Decisions, Heads, Text
from .slots import SlotLayer

PREFIX = "nestling_dmc_"
FUNCTION = "nestling_dmc"
FOLDED = "compressed:"  # before the type of each layer in config.json, which no stock config class takes
CODE = "modeling_nestling_dmc.py"
NAMES = (
    "gates",
    "heads",
    "kernel",
    "loops",
    "takes",
    "team",
    "pool",
    "slots",
    "plain",
    "ragged",
    "drop",
    "attend",
    "modeling",
)  # files to be copied


# ---- classes


@lru_cache
def config_class(base: str, stock: Any = None) -> type[PreTrainedConfig]:
    """The config of `base` models with a compressed cache: the stock one, `dmc` and `dmc_layers`.

    dmc: fields of `Gates`, and `layers`, `attention`, `rotate`, `separators`, `ratio`, `measured`. dmc_layers: per
    layer `rotary`, `plain` (attention that does not rotate) or None (not compressed). In config.json the types of
    layers bear a prefix that no stock class takes: read as the stock model, the checkpoint would run and be wrong.
    """
    stock, made = stock or CONFIG_MAPPING[base], cast(Any, None)

    def to_json_string(self: PreTrainedConfig, use_diff: bool = True) -> str:
        values = json.loads(super(made, self).to_json_string(use_diff))
        types = values.get("layer_types") or ["full_attention"] * self.num_hidden_layers
        values["layer_types"] = [FOLDED + name for name in types]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def from_dict(cls: type[PreTrainedConfig], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        values = dict(config_dict)
        types = [name.removeprefix(FOLDED) for name in values.pop("layer_types", None) or []]
        if types and "layer_types" in stock.__dataclass_fields__:
            values["layer_types"] = types
        return super(made, cls).from_dict(values, **kwargs)

    members: dict[str, Any] = {
        "model_type": PREFIX + base,
        "base_model_type": base,
        "dmc": None,
        "dmc_layers": None,
        "per_layer_fields": ("dmc_layers",),
        "to_json_string": to_json_string,
        "from_dict": classmethod(from_dict),
        "register_for_auto_class": classmethod(_nothing),
        "__module__": __name__,
        "__doc__": f"{stock.__name__} of a model whose cache is compressed.",
    }
    made = type(f"NestlingDmc{CONFIG_MAPPING[base].__name__}", (stock,), members)
    return made


@lru_cache
def model_class(base: str, stock: Any = None, config: Any = None) -> type[PreTrainedModel]:
    """The causal language model for `config_class(base)`: the stock one, attached."""
    plain: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]]

    made = cast(Any, None)

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        super(made, self).__init__(config)
        if stock is None and getattr(config, "layer_shapes", None):
            raise ValueError("the layers of this model differ in size: import nestling to load it")
        attach(self)

    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        names = {"AutoConfig": type(self.config).__name__, "AutoModelForCausalLM": type(self).__name__}
        self.config.auto_map = {auto: f"{Path(CODE).stem}.{name}" for auto, name in names.items()}
        super(made, self).save_pretrained(save_directory, *args, **kwargs)
        write_code(Path(save_directory), base, names)

    members: dict[str, Any] = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "register_for_auto_class": classmethod(_nothing),
        "config_class": config or config_class(base),
        "__module__": __name__,
        "__doc__": f"{plain.__name__} whose cache is compressed.",
    }
    made = type(f"NestlingDmc{plain.__name__}", (stock or plain,), members)
    return made


def write_code(folder: Path, base: str, names: dict[str, str]) -> None:
    """Put what the model needs to run into its folder, for `trust_remote_code`."""
    for name in NAMES:
        shutil.copyfile(Path(__file__).parent / f"{name}.py", folder / f"{name}.py")
    (folder / CODE).write_text(
        f'''"""Model code of this checkpoint, whose KV cache is compressed; written by Nestling, needs transformers."""

from .modeling import config_class, model_class

{names["AutoConfig"]} = config_class("{base}")
{names["AutoModelForCausalLM"]} = model_class("{base}")
'''
    )


def _nothing(cls: type, auto_class: str = "") -> None:
    """The files are copied by `save_pretrained` here, not by transformers."""


# ---- attaching


NO_TURN = (torch.empty(1, 1, 0), torch.empty(1, 1, 0))


class Wiring:
    """What the modules of one model share during a call: the text, and a list for decisions if they are wanted."""

    def __init__(self) -> None:
        self.text: Text | None = None
        self.gates = Gates()
        self.still: tuple[Tensor, Any] | None = None  # a rotation, and the one by nothing of its shape
        self.record: list[Decisions] | None = None


class View:
    """A config as a compressed attention module sees it: it names another attention function."""

    def __init__(self, config: Any):
        self.__dict__.update(_config=config, _attn_implementation=FUNCTION)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


def attach(model: PreTrainedModel) -> None:
    """Hand the attention of the layers in `config.dmc_layers` over. Raises `ValueError` if that was done already."""
    decoder, dmc = model.get_decoder(), model.config.dmc
    if hasattr(decoder, "dmc"):
        raise ValueError("this model's cache is compressed already")
    decoder.dmc = Wiring()
    decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
    for layer, kind in zip(model.get_submodule(dmc["layers"]), model.config.dmc_layers, strict=True):  # type: ignore
        if kind is not None:
            module = layer.get_submodule(dmc["attention"])
            module.dmc = decoder.dmc
            home = sys.modules[type(module).__module__]
            module.dmc_rotate = getattr(home, dmc["rotate"]) if kind == "rotary" else None
            module.config = View(module.config)
            module.register_forward_pre_hook(_before_attention, with_kwargs=True)


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[list[Decisions]]:
    """Within this context the list that is yielded takes up every layer's decisions, in order."""
    wiring = model.get_decoder().dmc
    wiring.record = []
    try:
        yield wiring.record
    finally:
        wiring.record = None


def slots_of(cache: DynamicCache, layer: int) -> SlotLayer:
    """The layer's slots; an unused layer of a `DynamicCache` becomes them. Raises `ValueError` for other caches."""
    while len(cache.layers) <= layer and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    found = cache.layers[layer]
    if type(found) is DynamicLayer and not found.is_initialized:
        found = cache.layers[layer] = SlotLayer()
    if not isinstance(found, SlotLayer):
        kind = type(found).__name__
        raise ValueError(f"a model with a compressed cache takes a new DynamicCache, not layers of {kind}")
    return found


def _before_decoder(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Note which tokens are real and which part documents."""
    ids = args[0] if args else kwargs.get("input_ids")
    like = ids if ids is not None else kwargs["inputs_embeds"][..., 0]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and (isinstance(mask, dict) or mask.dim() != 2):  # made for a static cache, or packed
        raise ValueError(
            "a model with a compressed cache takes a new DynamicCache (no static one), and an attention_mask [batch, "
            "seq] of real tokens only"
        )
    seq = like.shape[1]
    if seq > 1 and mask is None and positions is not None and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError("a model with a compressed cache takes one sequence per row: pad them instead of packing")
    if mask is None:
        valid = torch.ones_like(like, dtype=torch.bool)
    else:
        valid = mask[:, -seq:].bool().expand_as(like).contiguous()  # loops would not notice another size
    ends = torch.zeros_like(valid)
    for separator in module.config.dmc["separators"] if ids is not None else ():
        ends = ends | (ids == separator)
    module.dmc.text, module.dmc.gates = Text(valid, ends), Gates.of(module.config)


def _before_attention(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Take rotation and cache away from the stock module; they come back in `_attention`."""
    name = "cache" if "cache" in kwargs else "past_key_values"  # the latter before transformers 5.24
    cache, rotary = kwargs.get(name), kwargs.get("position_embeddings")
    slots = slots_of(cache, module.layer_idx) if cache is not None and not module.training else None
    if rotary is not None:
        if module.dmc.still is None or module.dmc.still[0] is not rotary[0]:
            module.dmc.still = rotary[0], (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))
        kwargs["position_embeddings"] = module.dmc.still[1]
    return args, kwargs | {name: None, "dmc": (slots, rotary)}


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    dmc: tuple[SlotLayer | None, tuple[Tensor, Tensor] | None] = (None, None),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `[batch, seq, query heads, dim]` from queries `[batch, query heads, seq, dim]`."""
    slots, rotary = dmc
    batch, _, seq, dim = query.shape
    grouped = query.view(batch, key.shape[1], -1, seq, dim)
    if module.dmc_rotate is None or rotary is None:  # the latter where a config has no positions
        heads = Heads(grouped, key, value, _as_it_is, scaling, NO_TURN)
    else:
        turn = rotary if in_halves(module.dmc_rotate, dim, rotary[0].shape[-1]) else None
        heads = Heads(grouped, key, value, partial(_rotated, module.dmc_rotate, rotary), scaling, turn)
    out, decisions = attention(heads, module.dmc.gates, module.dmc.text, slots, module.training, dropout)
    if module.dmc.record is not None and decisions is not None:
        module.dmc.record.append(decisions)
    return out.flatten(1, 2).transpose(1, 2), None


def _rotated(rotate: Any, rotary: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(query, key, *rotary)


@lru_cache
def in_halves(rotate: Any, dim: int, channels: int) -> bool:
    """Whether a model's rotation is that of channels i and i + half of the first `channels` ones: it is tried."""
    generator = torch.Generator().manual_seed(0)
    states, cos, sin = (torch.randn(1, 1, size, generator=generator) for size in (dim, channels, channels))
    first, second, rest = states.split([channels // 2, channels // 2, dim - channels], -1)
    expected = torch.cat([first, second, torch.zeros_like(rest)], -1)[..., :channels] * cos
    expected = torch.cat([expected + torch.cat([-second, first], -1) * sin, rest], -1)
    found = rotate(states.unsqueeze(1), states.unsqueeze(1), cos, sin)
    return all(torch.allclose(part[0], expected, atol=1e-5) for part in found)


def _as_it_is(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return query, key


AttentionInterface.register(FUNCTION, _attention)
