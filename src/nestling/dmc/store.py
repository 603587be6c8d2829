"""A compressed cache on disk: what a prompt left behind, to go on from later or on another machine.

Written as one safetensors file, beside its final name first. Layers that are not compressed are kept if they hold plain
keys and values; a sliding window or a state is refused, since transformers keeps those in other ways.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nestling.dmc.runtime.slots import PAGE, TENSORS, SlotLayer
from nestling.errors import CheckpointError, NestlingError
from nestling.runs import whole

PLAIN = ("keys", "values")


def save_cache(cache: DynamicCache, path: str | Path) -> Path:
    """Write a cache; pages that no head uses are left out.

    Raises `NestlingError` for layers of other kinds, `CheckpointError` for what the file system refuses.
    """
    tensors: dict[str, Tensor] = {}
    kinds = []
    for number, layer in enumerate(cast(Any, cache.layers)):
        slots = isinstance(layer, SlotLayer)
        if not (slots or type(layer) is DynamicLayer) or not layer.is_initialized:
            kind = type(layer).__name__
            raise NestlingError(f"layer {number} of the cache is a {kind}, which cannot be saved, or it is empty")
        kinds.append({"slots": slots, "tokens": layer.get_seq_length(), "page": PAGE})
        for name in TENSORS if slots else PLAIN:
            tensor = getattr(layer, name)
            if slots and name in PLAIN:
                tensor = tensor[: int(layer.used)]
            tensors[f"{number}.{name}"] = tensor.contiguous()
    path = Path(path)
    with whole(path) as beside:
        save_file(tensors, beside, metadata={"layers": json.dumps(kinds)})
    return path


def load_cache(path: str | Path, device: torch.device | str = "cpu") -> DynamicCache:
    """Read what `save_cache` wrote. Raises `CheckpointError` when it is missing, damaged or something else."""
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            kinds = json.loads(file.metadata()["layers"])
            cache = DynamicCache()
            for number, kind in enumerate(kinds):
                found = {name: file.get_tensor(f"{number}.{name}") for name in (TENSORS if kind["slots"] else PLAIN)}
                cache.layers.append(_layer(kind, found))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{path}' is not a saved cache or is damaged ({error}): save it again") from error
    return cache


def _layer(kind: dict[str, int], found: dict[str, Tensor]) -> DynamicLayer | SlotLayer:
    layer: DynamicLayer | SlotLayer
    if not kind["slots"]:
        layer = DynamicLayer()
        layer.update(found["keys"], found["values"])
        return layer
    if kind["page"] != PAGE:
        raise ValueError(f"its pages have {kind['page']} rows, not {PAGE}")
    layer = SlotLayer()
    layer.restore(found, kind["tokens"])
    return layer


def slot_layers(cache: DynamicCache) -> list[SlotLayer]:
    """The compressed layers of a cache."""
    return [layer for layer in cache.layers if isinstance(layer, SlotLayer)]


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache holds, whatever its layers are; of a compressed one with running sums and tables."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, SlotLayer):
            total += layer.nbytes
        else:
            held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
            held += [t for value in vars(layer).values() if isinstance(value, dict) for t in value.values()]
            total += sum(tensor.numel() * tensor.element_size() for tensor in held if isinstance(tensor, Tensor))
    return total
