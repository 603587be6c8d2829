"""Fewer experts by merging instead of dropping: what goes is averaged into the expert that is most like it.

After M-SMoE (arXiv 2310.01334): the best experts of a ranking stay; each other one joins the kept expert whose router
row is most similar; its neurons are put in the order that fits the kept one's, since experts are alike only up to that;
and the group is averaged, weighted by how often each was used. Router rows of kept experts stay. Which elements of
which tensor belong to a neuron follows from the anatomy's notation, so experts may be gated or not, and lie either way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy, TensorSpec
from nestling.anatomy.notation import Choice, Sizes, kept_elements, take
from nestling.moe.ffn import expert_axis, expert_tensors
from nestling.ranking import Ranking
from nestling.surgery.choose import choose, flat_units
from nestling.surgery.cut import assemble, current_ranking, sliced


def merge(model: PreTrainedModel, ranking: Ranking, num_experts: int, uses: list[Tensor]) -> PreTrainedModel:
    """The model with `num_experts` experts in each layer, the others merged into them; `model` is left as it is.

    ranking: of the experts, best ones stay. uses: how often each expert was chosen, for every layer with experts
    `[experts]` (`nestling.moe.loads`). Raises `ShapeError` for a number that the model cannot have.
    """
    anatomy = Anatomy.of(model)
    axis, routed = expert_axis(anatomy.architecture), anatomy.architecture.routed
    assert routed is not None
    selection = choose(anatomy, current_ranking(model, ranking), {axis.field: num_experts})
    weights = dict(model.state_dict())
    for layer, used in zip(anatomy.routed_layers(), uses, strict=True):
        kept, sizes = flat_units(selection, axis, layer), anatomy.sizes(layer)
        joins = groups(weights[f"{anatomy.layer_path(layer)}.{routed.router}.weight"], kept)
        inside = expert_tensors(anatomy, layer)
        orders = _orders(neurons(weights, inside, routed.neuron, sizes), joins)
        within = (*axis.within, axis.letter)
        fitted = Choice(orders.view(*(sizes[letter] for letter in within), -1), within)
        share = _shares(used.double().cpu(), joins.cpu())
        for spec in inside:
            tensor = take(weights[spec.name], kept_elements(spec.layout, {routed.neuron: fitted}, sizes))
            weights[spec.name] = _averaged(tensor, joins, share)
    return assemble(model, selection, sliced(weights, selection))


def groups(rows: Tensor, kept: Tensor) -> Tensor:
    """For each expert the kept one that it joins `[experts]`: the most similar by router row, itself if kept."""
    unit = F.normalize(rows.float(), dim=-1)
    joins = kept.to(rows.device)[(unit @ unit[kept.to(rows.device)].T).argmax(-1)]
    joins[kept] = kept.to(rows.device)
    return joins


def neurons(weights: Mapping[str, Tensor], inside: list[TensorSpec], letter: str, sizes: Sizes) -> Tensor:
    """All that belongs to each neuron of each expert `[experts, neurons, elements]`."""
    parts = []
    for spec in inside:
        for dim, dimension in enumerate(spec.layout):
            if letter in dimension.letters:
                by_neuron = dimension.owner((letter,), sizes).argsort(stable=True).to(weights[spec.name].device)
                rows = weights[spec.name].index_select(dim, by_neuron).movedim(dim, 1)
                parts.append(rows.reshape(len(rows), sizes[letter], -1))
    return torch.cat(parts, dim=-1)


def aligned(one: Tensor, other: Tensor) -> Tensor:
    """An order of `other`'s neurons that fits those of `one` `[neurons, features]`: greedy, best pairs first."""
    likeness = F.normalize(one.float(), dim=-1) @ F.normalize(other.float(), dim=-1).T
    order = torch.empty(len(one), dtype=torch.long, device=one.device)
    for _ in range(len(one)):
        mine, theirs = divmod(int(likeness.argmax()), likeness.shape[1])
        order[mine] = theirs
        likeness[mine], likeness[:, theirs] = -torch.inf, -torch.inf
    return order


def _orders(rows: Tensor, joins: Tensor) -> Tensor:
    """For each expert the order of its neurons that fits the expert it joins `[experts, neurons]`."""
    same = torch.arange(rows.shape[1], device=rows.device)
    orders = [same if i == kept else aligned(rows[kept], rows[i]) for i, kept in enumerate(joins.tolist())]
    return torch.stack(orders)


def _shares(used: Tensor, joins: Tensor) -> Tensor:
    """What each expert counts for in its group `[experts]`, by its use; evenly where none of it was used."""
    weight = used + 1e-6 * used.sum().clamp_min(1)
    return weight / torch.zeros_like(weight).index_add(0, joins, weight)[joins]


def _averaged(tensor: Tensor, joins: Tensor, share: Tensor) -> Tensor:
    """Each kept expert's part of a tensor `[experts, ...]` replaced by its group's average."""
    weighted = tensor * share.to(tensor).view(-1, *(1 for _ in tensor.shape[1:]))
    return torch.zeros_like(tensor).index_add(0, joins.to(tensor.device), weighted)
