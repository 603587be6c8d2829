"""Cutting and sorting: `prune` builds the smaller model, `reorder` sorts the parent in place.

Both take the same `Selection` and index every tensor by what its declared layout says; there is nothing here that
knows an architecture. The child is a plain transformers model. Paper: Minitron, arXiv 2407.14679, section 2.2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from nestling.anatomy import Anatomy, TensorSpec
from nestling.anatomy.notation import Dimension, take
from nestling.experts import use_fast_experts
from nestling.quiet import quiet, saved_as_published
from nestling.ranking.ranking import Ranking
from nestling.shape import child_config
from nestling.surgery.choose import Selection, choose
from nestling.surgery.merge import merge_heads
from nestling.surgery.repair import Batch, Repair

_SORTED = "_nestling_sorted"


def prune(
    model: PreTrainedModel,
    ranking: Ranking,
    shape: Mapping[str, Any],
    merge: str = "none",
    repair: Repair | Iterable[Batch] | None = None,
) -> PreTrainedModel:
    """The model of that shape cut from `model`, which is left as it is.

    Kept units stay in the parent's order. merge: what becomes of a pruned query head, `none`, or `paper` or `average`
    (see `nestling.surgery.merge`). repair: calibration batches on which the matrices that read pruned units are refit
    by least squares, or a `Repair` that was made once for many cuts; the kept weights are the parent's unless given.
    Raises `ShapeError` for a shape that the model, or the architecture's config class, cannot take.
    """
    anatomy = Anatomy.of(model)
    ranking = current_ranking(model, ranking)
    selection = choose(anatomy, ranking, shape)
    weights = model.state_dict()
    if merge != "none":
        weights = weights | merge_heads(weights, anatomy, ranking, selection, merge)
    if repair is not None:
        repair = repair if isinstance(repair, Repair) else Repair(model, repair)
        weights = weights | repair.refit(selection)
    return assemble(model, selection, sliced(weights, selection))


def reorder(model: PreTrainedModel, ranking: Ranking) -> Ranking:
    """Sort every axis of the model by the ranking, in place; logits do not change.

    Layers keep their places, but their order of importance is noted, so that `masked` and `prune` know it. Returns the
    ranking in terms of the sorted model. The given ranking may still be used with `prune`.
    """
    anatomy = Anatomy.of(model)
    ranking = current_ranking(model, ranking)
    selection = choose(anatomy, ranking, {}, ascending=False)
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in seen:  # tied tensors are sorted once
                seen.add(tensor.data_ptr())
                tensor.copy_(take(tensor, selection.index(anatomy.tensors[name])))
    after = sorted_ranking(selection, ranking)
    setattr(model, _SORTED, (ranking.fingerprint, after))
    return after


def current_ranking(model: PreTrainedModel, ranking: Ranking) -> Ranking:
    """The ranking in terms of the model as it stands now: `reorder` may have sorted it by this very ranking."""
    fingerprint, after = getattr(model, _SORTED, (None, ranking))
    return after if fingerprint == ranking.fingerprint else ranking


def sorted_by(model: PreTrainedModel) -> Ranking | None:
    """The ranking of a model that `reorder` has sorted, in terms of its present order."""
    return getattr(model, _SORTED, (None, None))[1]


def sliced(weights: Mapping[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """The kept part of every tensor, under the names that it has in the child."""
    place = {layer: position for position, layer in enumerate(selection.form.layers)}
    result = {}
    for name, spec in selection.anatomy.tensors.items():
        if selection.keeps(spec) and not selection.copies(spec):
            tensor = take(weights[name], selection.index(spec))
            result[renamed(selection.anatomy, spec, place)] = _rescaled(tensor, spec, selection)
    return result


def assemble(parent: PreTrainedModel, selection: Selection, weights: dict[str, Tensor]) -> PreTrainedModel:
    """A plain transformers model of the selection's shape that holds these weights."""
    config = child_config(selection.anatomy, selection.form)
    config.architectures = None
    with quiet():
        child = class_for(config).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=parent.dtype,
            attn_implementation=parent.config._attn_implementation,
        )
    saved_as_published(child)
    if child._can_set_experts_implementation():
        child.set_experts_implementation(parent.config._experts_implementation)
        use_fast_experts(child)
    child.generation_config = copy.deepcopy(parent.generation_config)
    return cast(Any, child).to(parent.device).train(parent.training)


def sorted_ranking(selection: Selection, ranking: Ranking) -> Ranking:
    """A ranking after its own order has been applied: the scores move with their units."""
    anatomy, scores = selection.anatomy, dict(ranking.scores)
    for field, axis in anatomy.axes.items():
        if field in scores:
            layers = [_moved(selection, axis.letter, layer) for layer in range(anatomy.num_layers)]
            old = scores[field]
            if isinstance(old, Tensor):
                scores[field] = old[layers[0]]
            else:
                scores[field] = tuple(
                    values[moved] if len(values) else values for values, moved in zip(old, layers, strict=True)
                )
    return Ranking(scores, dict(ranking.info) | {"sorted": True})


def _moved(selection: Selection, letter: str, layer: int) -> Tensor:
    """The old numbers of an axis's units, in their new order, counted through all groups."""
    anatomy = selection.anatomy
    axis = anatomy.by_letter(letter)
    units = Dimension(((*axis.within, letter),))
    index = units.index(selection.choices[layer], anatomy.sizes(layer))
    return torch.arange(anatomy.units(axis, layer)) if index is None else index


def renamed(anatomy: Anatomy, spec: TensorSpec, place: Mapping[int, int]) -> str:
    """The name of a tensor in the child. place: the number that each kept layer gets."""
    if spec.layer is None:
        return spec.name
    name = spec.name if spec.pattern is None else anatomy.sharing.named(spec.pattern, cast(int, spec.use), list(place))
    return anatomy.layer_path(place[spec.layer]) + name.removeprefix(anatomy.layer_path(spec.layer))


def _rescaled(tensor: Tensor, spec: TensorSpec, selection: Selection) -> Tensor:
    """Undo what a smaller axis changes elsewhere in the function (see `Rescale`)."""
    anatomy = selection.anatomy
    for rescale in anatomy.architecture.rescale:
        if rescale.tensor == spec.name and rescale.tied in (None, anatomy.tied):
            kept, full = selection.form.sizes[0][rescale.letter], anatomy.sizes(None)[rescale.letter]
            if kept != full:
                tensor = (tensor + rescale.offset) * (kept / full) ** rescale.power - rescale.offset
    return tensor


def class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
