"""Softmax attention in a model, derived from its declaration: which layers have it, and single channels of its heads.

A method that changes what attention remembers asks here where it is; it never names a module or a tensor itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.anatomy.anatomy import Anatomy
from nestling.anatomy.declare import Attention
from nestling.anatomy.notation import Choice, Dimension


@dataclass(frozen=True)
class Site:
    """A layer whose attention reaches every token before it.

    path: its attention module. rotary: whether queries and keys are rotated there. heads: key-value heads.
    """

    layer: int
    path: str
    declared: Attention
    rotary: bool
    heads: int


def sites(anatomy: Anatomy) -> list[Site]:
    """The layers with full attention, first to last; layers with a sliding window keep little and are left out."""
    found = []
    blocks = {(spec.layer, spec.block) for spec in anatomy.tensors.values()}
    for layer in range(anatomy.num_layers):
        for block, declared in anatomy.architecture.attention.items():
            if (layer, block) in blocks and declared.full(anatomy.config, layer):
                path = f"{anatomy.layer_path(layer)}.{declared.module}"
                rotary = declared.rotary(anatomy.config, layer)
                found.append(Site(layer, path, declared, rotary, anatomy.sizes(layer)["kv"]))
    return found


def last_channel(anatomy: Anatomy, site: Site) -> dict[str, Tensor]:
    """For every tensor that writes queries or keys there, the rows that write the last channel of each head."""
    rows: dict[str, list[Tensor]] = {}
    sizes = anatomy.sizes(site.layer)
    choice = {"d": Choice(torch.tensor([sizes["d"] - 1]))}
    for module, part in (site.declared.query, site.declared.key):
        for name in (f"{site.path}.{module}.weight", f"{site.path}.{module}.bias"):
            if name in anatomy.tensors:
                first = anatomy.tensors[name].layout[0]
                start = Dimension(first.parts[:part]).size(sizes) if part else 0
                index = Dimension((first.parts[part],)).index(choice, sizes)
                assert index is not None
                rows.setdefault(name, []).append(start + index)
    return {name: torch.cat(parts) for name, parts in rows.items()}
