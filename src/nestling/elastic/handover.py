"""One cache for two members: what one has read of a text, handed to another that goes on with it.

Members share their parent's first KV groups and most important layers, so a member finds in the cache of a larger one
all that it needs: the layers that it has, and in them its groups. The reverse works where the smaller one has cached
every layer and group that the larger one reads. Keys and values are those of the member that wrote them, close to
what the reader would have written, not equal to it; training on one teacher keeps them close.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache

from nestling.anatomy.notation import parse
from nestling.errors import ShapeError
from nestling.surgery.choose import Selection


def handover(cache: Cache, before: Selection, after: Selection, config: PreTrainedConfig) -> Cache:
    """The part of `before`'s cache that `after` reads, without a copy.

    config: of the model that will read it. Raises `ShapeError` when a layer or a KV group was not cached, or when a
    recurrent state would have to change its size.
    """
    result: Any = DynamicCache(config=config)
    places = {layer: place for place, layer in enumerate(before.form.layers)}
    for place, layer in enumerate(after.form.layers):
        if layer not in places:
            raise ShapeError(f"layer {layer} was not cached by the member before: hand over to one without it")
        if places[layer] < len(cache.layers):
            result.layers[place] = _narrowed(cache.layers[places[layer]], before, after, layer)
    return result


def _narrowed(held: Any, before: Selection, after: Selection, layer: int) -> Any:
    architecture = before.anatomy.architecture
    own, wanted = (selection.form.sizes[selection.form.layers.index(layer)] for selection in (before, after))
    for block in before.anatomy.blocks(layer):
        for product in (*architecture.state.get(block, ()), *architecture.recent.get(block, ())):
            sizes = [parse(f"({product})")[0].size(letters) for letters in (own, wanted)]
            if sizes[0] != sizes[1]:
                raise ShapeError(
                    f"layer {layer} keeps a state of {sizes[0]} numbers before and {sizes[1]} after: only members with "
                    f"the same state can take over from each other"
                )
        if block in architecture.kv_cache:
            return _first_groups(held, _groups(architecture.kv_cache[block][0], wanted), layer)
    return copy.deepcopy(held)  # a recurrent state is changed in place


def _groups(product: str, sizes: Mapping[str, int]) -> int:
    """KV heads in a layer: a token's keys without their channels, the last letter."""
    return parse(f"({product.rpartition(' ')[0]})")[0].size(sizes)


def _first_groups(held: Any, groups: int, layer: int) -> Any:
    held = copy.copy(held)
    if isinstance(getattr(held, "keys", None), Tensor) and held.keys.dim() == 4:
        if groups > held.keys.shape[1]:
            raise ShapeError(
                f"layer {layer} has {held.keys.shape[1]} KV groups in the cache, fewer than the {groups} needed"
            )
        held.keys, held.values = held.keys[:, :groups], held.values[:, :groups]
    return held
