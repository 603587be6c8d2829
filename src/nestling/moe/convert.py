"""From dense models to mixtures of experts, and to finer ones, weights kept: `upcycle` and `split`.

Upcycling cuts each FFN into `granularity` shards and repeats them as experts; the router's rows of a group of shards
are equal, so that a token always chooses whole groups (virtual groups, arXiv 2410.07524). With weights normalized over
the chosen, each shard gets 1 / granularity of the weight in all, which the down projection makes up for: the logits are
the dense model's. Splitting does the same to the experts of a mixture. Results are stock transformers models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nestling.anatomy import ARCHITECTURES, Anatomy, Architecture, Axis, architecture_of
from nestling.errors import NestlingError, ShapeError, UnsupportedArchitecture
from nestling.experts import use_fast_experts
from nestling.quiet import quiet
from nestling.surgery.cut import class_for

GATED = "(neuron + neuron) hidden"  # an expert's gate and up matrices, as the anatomy says it
MODES = ("exact", "paper")
GATE, UP, DOWN = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def upcycle(
    model: PreTrainedModel,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    granularity: int = 1,
    mode: str = "exact",
    router_std: float = 0.02,
    seed: int = 0,
    shared: int = 0,
) -> PreTrainedModel:
    """A mixture of experts that starts as the dense model; `model` is left as it is.

    It has `num_experts * granularity` experts of `1 / granularity` of the FFN's width, of which a token uses
    `num_experts_per_tok * granularity`: total and active parameters do not depend on the granularity.
    mode: `exact` normalizes the weights over the chosen and scales the down projection, so that logits are the dense
    model's; `paper` takes them from the softmax over all experts and scales all three matrices by the cube root of
    experts * granularity / chosen, which starts near the dense model and trained better (2410.07524, section 3).
    router_std: of the fresh router. shared: parts of the FFN, of `granularity`, that are not copied and make one expert
    for all tokens; a token then uses each of them once. Raises `UnsupportedArchitecture` for a model without a mixture
    like it, and `ShapeError` for numbers that do not go together.
    """
    anatomy = Anatomy.of(model)
    post = _mode(mode) == "exact"
    config = mixture_config(model.config, num_experts, num_experts_per_tok, granularity, post, shared)
    kin = architecture_of(config)
    routed = granularity - shared
    scales = (1.0, float(routed)) if post else ((num_experts * routed / num_experts_per_tok) ** (1 / 3),) * 2
    generator = torch.Generator().manual_seed(seed)
    weights, at = dict(model.state_dict()), places_of(kin)
    for layer in range(anatomy.num_layers):
        path = anatomy.layer_path(layer)
        gate, up, down = (weights.pop(f"{path}.mlp.{name}") for name in (GATE, UP, DOWN))
        shards = _shards(gate, up, down, granularity)
        for name, shard, scale in zip(("up", "down"), shards, scales, strict=True):
            weights[f"{path}.{at[name]}"] = (shard[shared:] * scale).repeat(num_experts, 1, 1)
        if shared:
            width = shared * gate.shape[0] // granularity
            for name, tensor in _shared_expert(kin, gate[:width], up[:width], down[:, :width]).items():
                weights[f"{path}.{name}"] = tensor
        rows = torch.randn(num_experts, gate.shape[1], generator=generator) * router_std
        weights[f"{path}.{at['router']}"] = rows.to(gate).repeat_interleave(routed, 0)
    return built(model, config, weights)


def split(model: PreTrainedModel, granularity: int) -> PreTrainedModel:
    """A mixture with each expert cut into `granularity` of its width, all of them chosen together: the same logits.

    The way into fine experts from a trained mixture; once training or pruning breaks the ties, they part.
    """
    anatomy = Anatomy.of(model)
    experts, neurons = axes_of(anatomy.architecture)
    at, config = places_of(anatomy.architecture), copy.deepcopy(model.config)
    width = anatomy.value(neurons, anatomy.routed_layers()[0])
    _check_width(width, granularity)
    setattr(config, experts.field, getattr(config, experts.field) * granularity)
    setattr(config, str(experts.active), getattr(config, str(experts.active)) * granularity)
    setattr(config, neurons.field, width // granularity)
    weights = dict(model.state_dict())
    for layer in anatomy.routed_layers():
        up, down, router = (f"{anatomy.layer_path(layer)}.{at[name]}" for name in ("up", "down", "router"))
        parts = []
        for fused, out in zip(weights[up], weights[down], strict=True):
            gate, raised = fused.chunk(2)
            parts.append(_shards(gate, raised, out * granularity, granularity))
        weights[up], weights[down] = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        weights[router] = weights[router].repeat_interleave(granularity, 0)
    return built(model, config, weights)


def mixture_config(
    config: PreTrainedConfig,
    num_experts: int,
    num_experts_per_tok: int,
    granularity: int = 1,
    post: bool = True,
    shared: int = 0,
) -> PreTrainedConfig:
    """The config of the mixture that is like a dense model; see `upcycle`.

    post: weights normalized over the chosen experts. Raises as `upcycle` does.
    """
    dense = architecture_of(config)
    kin = _kin(dense, shared)
    assert kin.routed is not None
    _check_numbers(config.intermediate_size, num_experts, num_experts_per_tok, granularity, post, shared)
    if isinstance(kin.routed.post, bool) and kin.routed.post != post:
        raise UnsupportedArchitecture(
            f"{kin.model_type} always normalizes over the chosen experts: take mode exact, or a model such as qwen3"
        )
    made, (experts, neurons) = config_like(kin.model_type, config), axes_of(kin)
    width = config.intermediate_size // granularity
    setattr(made, experts.field, num_experts * (granularity - shared))
    setattr(made, str(experts.active), num_experts_per_tok * (granularity - shared))
    setattr(made, neurons.field, width)
    if shared:
        down = f"{kin.routed.shared}."
        field = next(axis.field for axis in kin.axes if any(f"{at}.".startswith(down) for at in axis.scored_at[:1]))
        setattr(made, field, width * shared)
    if isinstance(kin.routed.post, str):
        setattr(made, kin.routed.post, post)
    return made


def _kin(dense: Architecture, shared: int) -> Architecture:
    """The mixture that is like a dense model, with a shared expert or without."""
    name = dense.shared_kin if shared else dense.mixture_kin
    if name is not None:
        return ARCHITECTURES[name]
    able = ", ".join(sorted(n for n, a in ARCHITECTURES.items() if (a.shared_kin if shared else a.mixture_kin)))
    other = dense.mixture_kin if shared else dense.shared_kin
    what, else_ = ("with", "leave shared out") if shared else ("without", "give shared=1 or more")
    raise UnsupportedArchitecture(
        f"no mixture of experts {what} a shared one in transformers is like a {dense.model_type} model: "
        f"{else_ + ', or ' if other else ''}give one of {able}"
    )


def _shared_expert(kin: Architecture, gate: Tensor, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """The tensors of an expert for all tokens. A gate of its own starts at one half, which the last matrix makes up."""
    assert kin.routed is not None
    at = kin.routed.shared
    names, gated = shared_names(kin), f"{at}_gate.weight"
    if any(gated in block for block in kin.blocks.values()):
        extra, down = {gated: torch.zeros_like(gate[:1])}, 2 * down
    else:
        extra = {}
    parts = [gate, up, down] if len(names) == 3 else [torch.cat([gate, up]), down]
    return dict(zip(names, parts, strict=True)) | extra


def shared_names(architecture: Architecture) -> list[str]:
    """Tensors, relative to a layer, of the expert that all tokens share: gate, up, down, the first two maybe as one."""
    at = architecture.routed.shared if architecture.routed else None
    return [name for block in architecture.blocks.values() for name in block if at and name.startswith(f"{at}.")]


def _mode(mode: str) -> str:
    if mode not in MODES:
        raise NestlingError(f"mode='{mode}' is not known: choose {' or '.join(MODES)}")
    return mode


def _check_numbers(width: int, experts: int, per_token: int, granularity: int, post: bool, shared: int) -> None:
    if not 1 <= per_token <= experts:
        raise ShapeError(f"num_experts_per_tok={per_token} of num_experts={experts} cannot be: take 1 to {experts}")
    _check_width(width, granularity)
    if not 0 <= shared < granularity:
        raise ShapeError(
            f"shared={shared} of {granularity} parts of the FFN cannot be: take 0 to {granularity - 1}, or finer parts"
        )
    if post and per_token * (granularity - shared) == 1:
        raise ShapeError(
            "one expert per token, normalized over itself, always has weight 1 and its router no gradient: take "
            "num_experts_per_tok=2, a finer granularity, or weights from the softmax over all (mode paper)"
        )


def _check_width(width: int, granularity: int) -> None:
    if granularity < 1 or width % granularity:
        near = [n for n in range(1, min(width, 4 * max(1, granularity)) + 1) if width % n == 0]
        raise ShapeError(
            f"granularity={granularity} does not divide the width {width}: take one of {', '.join(map(str, near))}"
        )


def config_like(model_type: str, like: PreTrainedConfig) -> PreTrainedConfig:
    """A config of that type, with every field that `like` has too."""
    known = set(CONFIG_MAPPING[model_type]().to_dict())
    fields = {name: value for name, value in like.to_dict().items() if name in known}
    for name in ("model_type", "architectures", "transformers_version", "layer_types"):
        fields.pop(name, None)
    made = AutoConfig.for_model(model_type, **fields)
    architecture = ARCHITECTURES[model_type]
    for letter, name in architecture.explicit.items():  # sizes that one class derives and the other writes down
        source = architecture.sizes[letter]
        if callable(source) and source(made) != source(like):
            setattr(made, name, source(like))
    return made


def axes_of(architecture: Architecture) -> tuple[Axis, Axis]:
    """Experts, and the neurons in them. Raises `UnsupportedArchitecture` for a model without both."""
    experts = next((axis for axis in architecture.axes if axis.active), None)
    inner = [axis for axis in architecture.axes if experts is not None and experts.letter in axis.within]
    up = places_of(architecture)["up"]
    layout = next((tensors[up] for tensors in architecture.blocks.values() if up in tensors), "")
    if experts is None or not inner or not layout.endswith(GATED):
        raise UnsupportedArchitecture(
            f"{architecture.model_type} has no routed experts with gate and up matrices one above the other, so they "
            f"cannot be converted or merged"
        )
    return experts, inner[0]


def places_of(architecture: Architecture) -> dict[str, str]:
    """Names, relative to a layer, of the router and of the experts' tensors."""
    routed = architecture.routed
    if routed is None:
        return {"router": "", "up": "", "down": ""}
    experts = routed.experts
    return {
        "router": f"{routed.router}.weight",
        "up": f"{experts}.gate_up_proj",
        "down": f"{experts}.down_proj",
    }


def _shards(gate: Tensor, up: Tensor, down: Tensor, granularity: int) -> tuple[Tensor, Tensor]:
    """An FFN cut along its neurons: `[granularity, 2 width, hidden]`, `[granularity, hidden, width]`."""
    fused = [torch.cat(pair) for pair in zip(gate.chunk(granularity), up.chunk(granularity), strict=True)]
    return torch.stack(fused), torch.stack(down.chunk(granularity, dim=1))


def built(like: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of that config with those weights, otherwise as `like`; biases that are not among them are zero.

    Raises `UnsupportedArchitecture` for weights that it has no place for.
    """
    config.architectures = None
    with quiet():
        with torch.device("meta"):
            empty = class_for(config)(config)
        places = empty.state_dict()
        extra = sorted(set(weights) - set(places))
        if extra:
            raise UnsupportedArchitecture(
                f"a {config.model_type} model has no place for {extra[0]}: such a model cannot be converted"
            )
        zeros = {n: torch.zeros(t.shape) for n, t in places.items() if n.endswith(".bias") and n not in weights}
        made = class_for(config).from_pretrained(
            None,
            config=config,
            state_dict={name: tensor.clone() for name, tensor in weights.items()} | zeros,
            dtype=like.dtype,
            attn_implementation=like.config._attn_implementation,
        )
    made.generation_config = copy.deepcopy(like.generation_config)
    return use_fast_experts(cast(Any, made).to(like.device).train(like.training))
