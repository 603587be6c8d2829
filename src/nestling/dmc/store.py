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

from nestling.dmc.runtime.gates import wide
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
    _check(found)
    layer = SlotLayer()
    layer.restore(found, kind["tokens"])
    return layer


def _check(found: dict[str, Tensor]) -> None:
    """Raises `ValueError` for tensors that do not belong together: loops read and write where tables say."""
    keys, table, length = found["keys"], found["table"], found["length"]
    (batch, heads, columns), dim = table.shape, keys.shape[-1]
    recent = found["recent"].shape[-1]
    shapes = {"keys": (len(keys), PAGE, dim), "values": tuple(keys.shape), "length": (batch, heads), "used": (1,)}
    shapes |= {"sums": (batch, heads, 0 if recent else 2 * dim + 1), "recent": (batch, heads, recent)}
    shapes |= {"ended": (batch,), "seen": (batch,)}
    types = {"values": keys.dtype, "sums": wide(keys.dtype), "recent": torch.int32, "ended": torch.bool}
    types |= dict.fromkeys(("table", "length", "used", "seen"), torch.long)
    for name, tensor in found.items():
        shape, dtype = shapes.get(name, tuple(tensor.shape)), types.get(name, tensor.dtype)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    held = torch.arange(columns, device=table.device) * PAGE < length.unsqueeze(-1)
    pages = table[held]
    slots = torch.where(found["recent"] < 0, -1 - found["recent"], found["recent"])
    inside = 0 <= int(found["used"]) <= len(keys) and bool(((pages >= 0) & (pages < found["used"])).all())
    if not inside or len(pages.unique()) < len(pages) or length.min() < 0 or length.max() > columns * PAGE:
        raise ValueError("its table names pages that are not there, or one of them twice")
    if (slots >= length.unsqueeze(-1).clamp_min(1)).any():
        raise ValueError("its newest tokens are in slots that are not there")


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
