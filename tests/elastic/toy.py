"""A sorted tiny parent and its choices, for tests of families."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.elastic.space import Space
from nestling.ranking import Ranking
from nestling.surgery import Selection, choose, reorder
from nestling.surgery.choose import prefix_ranking
from tests.models import random_ranking, tiny


def sorted_parent(variant: str, **overrides) -> tuple[PreTrainedModel, Ranking]:
    """A model sorted by a random ranking, and the ranking of its prefixes."""
    model = tiny(variant, **overrides)
    after = reorder(model, random_ranking(model))
    anatomy = Anatomy.of(model)
    return model, prefix_ranking(anatomy, after.scores[anatomy.depth_field])  # type: ignore[arg-type]


def space_of(model: PreTrainedModel, ranking: Ranking, per_layer: Sequence[str] | None = None) -> Space:
    """Everything may be chosen, layer by layer unless `per_layer` says otherwise."""
    anatomy = Anatomy.of(model)
    order = anatomy.by_importance(ranking.order(anatomy.depth_field).tolist())
    alike = anatomy.architecture.alike
    fields = [field for field, axis in anatomy.axes.items() if axis.scope == "layer" and field not in alike]
    return Space(anatomy, order, fields if per_layer is None else per_layer)


def selected(model: PreTrainedModel, ranking: Ranking, shape) -> Selection:
    return choose(Anatomy.of(model), ranking, shape)


def one_hot(space: Space, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random hard choices, as chances that ask for gradients and as sizes."""
    generator = torch.Generator().manual_seed(seed)
    chances, sizes = {}, {}
    for field, knob in space.knobs.items():
        rows, count = knob.sizes.shape
        picked = torch.randint(0, count, (rows,), generator=generator)
        chances[field] = torch.nn.functional.one_hot(picked, count).double().requires_grad_()
        sizes[field] = knob.sizes.gather(1, picked[:, None]).flatten().long()
    return chances, sizes


def random_logits(space: Space, seed: int, spread: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        field: spread * torch.randn(knob.sizes.shape, generator=generator, dtype=torch.float64)
        for field, knob in space.knobs.items()
    }
