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
from nestling.anatomy.notation import Choice, kept_elements, take
from nestling.errors import NestlingError, ShapeError, UnsupportedArchitecture
from nestling.experts import use_fast_experts
from nestling.moe.ffn import expert_axis, shared_letter, taken, width_axis, written
from nestling.quiet import quiet, saved_as_published
from nestling.surgery.cut import class_for

MODES = ("exact", "paper")
WIDTH = "intermediate_size"  # of a dense FFN, in the configs of all models that mixtures are made of


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
    dense, post = Anatomy.of(model), _mode(mode) == "exact"
    config = mixture_config(model.config, num_experts, num_experts_per_tok, granularity, post, shared)
    made, routed = Anatomy.of(config), granularity - shared
    where = made.architecture.routed
    assert where is not None
    enters, leaves = (1.0, float(routed)) if post else ((num_experts * routed / num_experts_per_tok) ** (1 / 3),) * 2
    generator = torch.Generator().manual_seed(seed)
    weights = dict(model.state_dict())
    for layer in range(dense.num_layers):
        matrices = taken(weights, dense, layer, dense.axes[WIDTH].letter)
        parts = [matrix.unflatten(0, (granularity, -1)) for matrix in matrices]
        scales = [*(enters for _ in parts[1:]), leaves]
        experts = [(part[shared:] * scale).repeat(num_experts, 1, 1) for part, scale in zip(parts, scales, strict=True)]
        weights |= written(made, layer, where.neuron, experts)
        if shared:
            weights |= _shared_expert(made, layer, [part[:shared].flatten(0, 1) for part in parts])
        rows = torch.randn(num_experts, matrices[0].shape[1], generator=generator) * router_std
        weights[f"{made.layer_path(layer)}.{where.router}.weight"] = rows.to(matrices[0]).repeat_interleave(routed, 0)
    return built(model, config, weights)


def split(model: PreTrainedModel, granularity: int) -> PreTrainedModel:
    """A mixture with each expert cut into `granularity` of its width, all of them chosen together: the same logits.

    The way into fine experts from a trained mixture; once training or pruning breaks the ties, they part.
    """
    anatomy, config = Anatomy.of(model), copy.deepcopy(model.config)
    experts, neurons = expert_axis(anatomy.architecture), width_axis(anatomy.architecture)
    layers, weights = anatomy.routed_layers(), dict(model.state_dict())
    width = anatomy.value(neurons, layers[0])
    _check_width(width, granularity)
    _check_groups(anatomy, experts, layers[0])
    setattr(config, experts.field, getattr(config, experts.field) * granularity)
    setattr(config, str(experts.active), getattr(config, str(experts.active)) * granularity)
    setattr(config, neurons.field, width // granularity)
    for layer in layers:
        sizes, choices = anatomy.sizes(layer), _parts(anatomy, experts, neurons, layer, granularity)
        for spec in anatomy.of_layer[layer]:
            if experts.letter in spec.letters:
                weights[spec.name] = take(weights[spec.name], kept_elements(spec.layout, choices, sizes))
        down = next(anatomy.places(neurons, layer)).tensor
        weights[down] = weights[down] * _share(anatomy, granularity)
    return built(model, config, weights)


def _parts(anatomy: Anatomy, experts: Axis, neurons: Axis, layer: int, granularity: int) -> dict[str, Choice]:
    """Every expert `granularity` times, each time with the next part of its neurons."""
    count, width = (anatomy.sizes(layer)[axis.letter] for axis in (experts, neurons))
    groups = (1,) * len(experts.within)
    units = torch.arange(count).repeat_interleave(granularity).view(*groups, -1)
    inside = torch.arange(width).view(granularity, -1).repeat(count, 1)
    return {
        experts.letter: Choice(units, experts.within),
        neurons.letter: Choice(inside.view(*groups, *inside.shape), neurons.within),
    }


def _share(anatomy: Anatomy, granularity: int) -> int:
    """How many times less weight each part of an expert gets than the whole had: sigmoids alone leave it what it is."""
    routed = anatomy.architecture.routed
    assert routed is not None
    normalized = getattr(anatomy.config, routed.post) if isinstance(routed.post, str) else routed.post
    return 1 if routed.bias and not normalized else granularity


def _check_groups(anatomy: Anatomy, experts: Axis, layer: int) -> None:
    groups = anatomy.units(experts, layer) // anatomy.sizes(layer)[experts.letter]
    if groups > 1:
        raise UnsupportedArchitecture(
            f"the experts of this {anatomy.architecture.model_type} model are in {groups} groups, chosen by the two "
            f"best experts of each, which parts of an expert would change: such a model cannot be split"
        )


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
            f"{kin.model_type} always normalizes over the chosen experts: leave it so (mode exact, normalize true), "
            f"or take a model such as qwen3"
        )
    made, experts, neurons = config_like(kin.model_type, config), expert_axis(kin), width_axis(kin)
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


def _shared_expert(made: Anatomy, layer: int, matrices: list[Tensor]) -> dict[str, Tensor]:
    """The tensors of an expert for all tokens. A gate of its own starts at one half, which the last matrix makes up."""
    letter, routed = shared_letter(made, layer), made.architecture.routed
    assert letter is not None
    assert routed is not None
    extra: dict[str, Tensor] = {}
    gate = f"{made.layer_path(layer)}.{routed.shared}_gate.weight"
    if gate in made.tensors:
        extra[gate] = torch.zeros_like(matrices[0][:1])
        matrices = [*matrices[:-1], 2 * matrices[-1]]
    return written(made, layer, letter, matrices) | extra


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
    saved_as_published(made)
    made.generation_config = copy.deepcopy(like.generation_config)
    return use_fast_experts(cast(Any, made).to(like.device).train(like.training))
