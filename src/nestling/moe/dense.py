"""From a mixture of experts to a dense model, to be distilled: `to_dense` (arXiv 2605.28207).

The best experts of each layer, and the one that all tokens share where there is one, side by side are one FFN. What
routers and gates decide for each token becomes one number, which goes into the down projections: the experts' mean
weight in all, evenly, and the shared one's.
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
from nestling.moe.convert import WIDTH, built, config_like
from nestling.moe.ffn import Weights, expert_axis, shared_letter, taken, written
from nestling.moe.train import routed_modules
from nestling.ranking import Ranking


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
    axis, routed = expert_axis(anatomy.architecture), anatomy.architecture.routed
    assert routed is not None
    kin, count = check_dense(anatomy, experts)
    sizes, shared, config = anatomy.sizes(0), shared_letter(anatomy, 0), config_like(kin, model.config)
    setattr(config, WIDTH, count * sizes[routed.neuron] + (sizes[shared] if shared else 0))
    made, weights = Anatomy.of(config), dict(model.state_dict())
    shares = [(1.0, 0.5)] * anatomy.num_layers if batches is None else mean_weights(model, batches)
    for layer, (chosen, gated) in enumerate(shares):
        parts = [_shared(weights, anatomy, layer, shared, gated)] if shared else []
        best = ranking.order(axis.field, layer)[:count].sort().values
        *enter, leave = (m[best.to(m.device)].flatten(0, 1) for m in taken(weights, anatomy, layer, routed.neuron))
        parts.append([*enter, leave * (chosen / count)])
        for spec in anatomy.of_layer[layer]:
            if axis.letter in spec.letters:  # what is left is the router
                weights.pop(spec.name, None)
        joined = [torch.cat(same) for same in zip(*parts, strict=True)]
        weights |= written(made, layer, made.axes[WIDTH].letter, joined)
    return built(model, config, weights)


def check_dense(anatomy: Anatomy, experts: int | None = None) -> tuple[str, int]:
    """The type of the dense model that `to_dense` makes, and how many experts go into each FFN. Raises as it does."""
    architecture = anatomy.architecture
    axis, kin = expert_axis(architecture), architecture.dense_kin
    if kin is None or anatomy.routed_layers() != list(range(anatomy.num_layers)):
        able = ", ".join(sorted(name for name, other in ARCHITECTURES.items() if other.dense_kin))
        raise UnsupportedArchitecture(
            f"no dense model is like this {architecture.model_type} model: every layer must have experts, and it be "
            f"one of {able}"
        )
    if len({tuple(sorted(anatomy.sizes(layer).items())) for layer in range(anatomy.num_layers)}) > 1:
        raise UnsupportedArchitecture("the layers of this model differ in size, which no stock dense model can")
    count, most = experts or getattr(anatomy.config, str(axis.active)), anatomy.value(axis, 0)
    if not 1 <= count <= most:
        raise ShapeError(f"experts={count} of {most} cannot be kept: give a number up to that")
    return kin, count


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


def _shared(weights: Weights, anatomy: Anatomy, layer: int, letter: str, gated: float) -> list[Tensor]:
    """The matrices of the expert that all tokens share, taken out of `weights`; its gate counts as a constant."""
    *enter, leave = taken(weights, anatomy, layer, letter)
    gate = weights.pop(f"{anatomy.layer_path(layer)}.{_gate(anatomy)}.weight", None)
    return [*enter, leave if gate is None else leave * gated]


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
