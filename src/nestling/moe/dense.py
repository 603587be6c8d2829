"""From a mixture of experts to a dense model, to be distilled: `to_dense` (arXiv 2605.28207).

The best experts of each layer, and the one that all tokens share where there is one, side by side are one FFN. What
routers and gates decide for each token becomes one number, which goes into the down projections: the experts' mean
weight in all, evenly, and the shared one's. Knows the parts of mixtures by their declarations, as `convert` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import ARCHITECTURES, Anatomy, decoder
from nestling.anatomy.bypass import evaluating
from nestling.errors import ShapeError, UnsupportedArchitecture
from nestling.moe.convert import DOWN, GATE, UP, axes_of, built, config_like, places_of, shared_names
from nestling.moe.train import routed_modules
from nestling.ranking import Ranking

Weights = dict[str, Tensor]
FFN = tuple[Tensor, Tensor, Tensor]  # gate, up `[neurons, hidden]` and down `[hidden, neurons]`


def to_dense(
    model: PreTrainedModel,
    ranking: Ranking,
    experts: int | None = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
) -> PreTrainedModel:
    """The dense model whose FFN is the best `experts` of each layer side by side, as many as a token uses unless given.

    ranking: of the experts. A shared expert goes first. batches: text on which the mean weight of a token's experts in
    all, and that of the shared one's gate, are measured; they are taken for 1 and for a half without it, which is exact
    where weights are normalized over the chosen and nothing is gated. It is a start for distillation, not a model to
    use as it is. Raises `UnsupportedArchitecture` where no dense model is alike.
    """
    anatomy = Anatomy.of(model)
    axis, _ = axes_of(anatomy.architecture)
    dense = _dense_kin(anatomy)
    count = experts or getattr(model.config, str(axis.active))
    if not 1 <= count <= anatomy.value(axis, 0):
        raise ShapeError(f"experts={count} of {anatomy.value(axis, 0)} cannot be kept: give a number up to that")
    shares = [(1.0, 0.5)] * anatomy.num_layers if batches is None else mean_weights(model, batches)
    weights, config = dict(model.state_dict()), config_like(dense, model.config)
    for layer, (routed, gated) in enumerate(shares):
        path, best = anatomy.layer_path(layer), ranking.order(axis.field, layer)[:count].sort().values
        shared = _shared(weights, anatomy, path, gated)
        parts = [*shared, _side_by_side(weights, anatomy, path, best, routed / count)]
        gate, up, down = (
            torch.cat(tensors, dim) for tensors, dim in zip(zip(*parts, strict=True), (0, 0, 1), strict=True)
        )
        weights |= {f"{path}.mlp.{name}": tensor for name, tensor in ((GATE, gate), (UP, up), (DOWN, down))}
        config.intermediate_size = len(gate)
    return built(model, config, weights)


def mean_weights(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[tuple[float, float]]:
    """For each layer with experts, means over all tokens: the weight of a token's experts together, and of the shared.

    The second is 1 where the shared expert has no gate, or there is none.
    """
    anatomy = Anatomy.of(model)
    sums: list[tuple[list[Tensor], list[Tensor]]] = []
    modules = dict(model.named_modules())
    with ExitStack() as hooks, evaluating(model):
        for layer, router, _ in routed_modules(model):
            sums.append(([], []))
            hooks.callback(router.register_forward_hook(_noting(sums[-1][0], lambda output: output[1].sum(-1))).remove)
            name = f"{anatomy.layer_path(layer)}.{_gate(anatomy)}"
            if name in modules:
                hooks.callback(modules[name].register_forward_hook(_noting(sums[-1][1], torch.sigmoid)).remove)
        for batch in batches:
            decoder(model)(input_ids=batch["input_ids"].to(model.device), use_cache=False)
    return [(_mean(chosen), _mean(gates)) for chosen, gates in sums]


def _dense_kin(anatomy: Anatomy) -> str:
    dense = anatomy.architecture.dense_kin
    if dense is None or anatomy.routed_layers() != list(range(anatomy.num_layers)):
        raise UnsupportedArchitecture(
            f"no dense model is like this {anatomy.architecture.model_type} model: every layer must have experts, and "
            f"be one of {', '.join(sorted(n for n, a in ARCHITECTURES.items() if a.dense_kin))}"
        )
    return dense


def _side_by_side(weights: Weights, anatomy: Anatomy, path: str, best: Tensor, weight: float) -> FFN:
    """Those experts as one FFN, each with that weight; they and the router are taken out of `weights`."""
    at = places_of(anatomy.architecture)
    weights.pop(f"{path}.{at['router']}")
    fused, down = (weights.pop(f"{path}.{at[name]}") for name in ("up", "down"))
    gate, up = fused[best.to(fused.device)].chunk(2, dim=1)
    return gate.flatten(0, 1), up.flatten(0, 1), down[best.to(down.device)].transpose(0, 1).flatten(1) * weight


def _shared(weights: Weights, anatomy: Anatomy, path: str, gated: float) -> list[FFN]:
    """The expert that all tokens share, if there is one, taken out of `weights`; its gate counts as a constant."""
    names = [f"{path}.{name}" for name in shared_names(anatomy.architecture)]
    tensors = [weights.pop(name) for name in names if name in weights]
    if not tensors:
        return []
    gate, up, down = tensors if len(tensors) == 3 else (*tensors[0].chunk(2), tensors[1])
    gate_weight = weights.pop(f"{path}.{_gate(anatomy)}.weight", None)
    return [(gate, up, down if gate_weight is None else down * gated)]


def _gate(anatomy: Anatomy) -> str:
    """The shared expert's gate, relative to a layer, whether or not the layer has one."""
    routed = anatomy.architecture.routed
    return f"{routed.shared if routed else None}_gate"


def _noting(into: list[Tensor], read: Callable[[Any], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        into.append(read(output).detach().double().flatten())

    return hook


def _mean(values: list[Tensor]) -> float:
    return torch.cat(values).mean().item() if values else 1.0
