"""Fewer experts by merging instead of dropping: what goes is averaged into the expert that is most like it.

After M-SMoE (arXiv 2310.01334): the best experts of a ranking stay; each other one joins the kept expert whose router
row is most similar; its neurons are put in the order that fits the kept one's, since experts are alike only up to that;
and the group is averaged, weighted by how often each was used. Router rows of kept experts stay.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.moe.convert import axes_of, places_of
from nestling.ranking import Ranking
from nestling.surgery.choose import choose
from nestling.surgery.cut import assemble, current_ranking, sliced


def merge(model: PreTrainedModel, ranking: Ranking, num_experts: int, uses: list[Tensor]) -> PreTrainedModel:
    """The model with `num_experts` experts in each layer, the others merged into them; `model` is left as it is.

    ranking: of the experts, best ones stay. uses: how often each expert was chosen, for every layer with experts
    `[experts]` (`nestling.moe.loads`). Raises `ShapeError` for a number that the model cannot have.
    """
    anatomy = Anatomy.of(model)
    axis, _ = axes_of(anatomy.architecture)
    selection = choose(anatomy, current_ranking(model, ranking), {axis.field: num_experts})
    weights, at = dict(model.state_dict()), places_of(anatomy.architecture)
    for layer, used in zip(anatomy.routed_layers(), uses, strict=True):
        kept = selection.choices[layer][axis.letter].units
        up, down, router = (f"{anatomy.layer_path(layer)}.{at[name]}" for name in ("up", "down", "router"))
        joins = groups(weights[router], kept)
        weights[up], weights[down] = _merged(weights[up], weights[down], joins, used.to(weights[up]))
    return assemble(model, selection, sliced(weights, selection))


def groups(rows: Tensor, kept: Tensor) -> Tensor:
    """For each expert the kept one that it joins `[experts]`: the most similar by router row, itself if kept."""
    unit = F.normalize(rows.float(), dim=-1)
    joins = kept.to(rows.device)[(unit @ unit[kept.to(rows.device)].T).argmax(-1)]
    joins[kept] = kept.to(rows.device)
    return joins


def aligned(one: Tensor, other: Tensor) -> Tensor:
    """An order of `other`'s neurons that fits those of `one` `[neurons, features]`: greedy, best pairs first."""
    likeness = F.normalize(one.float(), dim=-1) @ F.normalize(other.float(), dim=-1).T
    order = torch.empty(len(one), dtype=torch.long, device=one.device)
    for _ in range(len(one)):
        mine, theirs = divmod(int(likeness.argmax()), likeness.shape[1])
        order[mine] = theirs
        likeness[mine], likeness[:, theirs] = -torch.inf, -torch.inf
    return order


def _merged(up: Tensor, down: Tensor, joins: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' tensors with each kept expert replaced by its group's average."""
    up, down, before = up.clone(), down.clone(), (up, down)
    for kept in joins.unique().tolist():
        members = [kept, *(i for i in torch.nonzero(joins == kept).flatten().tolist() if i != kept)]
        if len(members) == 1:
            continue
        share = used[members] + 1e-6 * used.sum().clamp_min(1)
        share = share / share.sum()
        reference = _neurons(before[0][kept], before[1][kept])
        total_up, total_down = torch.zeros_like(up[kept]), torch.zeros_like(down[kept])
        for part, member in zip(share, members, strict=True):
            gate, raised = before[0][member].chunk(2)
            lowered = before[1][member]
            order = aligned(reference, _neurons(before[0][member], lowered))
            total_up += part * torch.cat([gate[order], raised[order]])
            total_down += part * lowered[:, order]
        up[kept], down[kept] = total_up, total_down
    return up, down


def _neurons(up: Tensor, down: Tensor) -> Tensor:
    """All weights of each neuron of one expert `[neurons, 3 * hidden]`."""
    gate, raised = up.chunk(2)
    return torch.cat([gate, raised, down.T], dim=-1)
