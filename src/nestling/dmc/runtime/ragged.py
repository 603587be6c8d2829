"""A decoding step's attention where compiled loops do not serve, as on GPUs: kernels of others that read what is held.

Every head of every sequence is a row of its own, and its keys are its pages. `flex` is torch's flex attention with
pages as its blocks, for any dtype. `packed` is flash attention over rows of different length (of the package
flash-attn, else of torch), for half precision; its pages are put in one line first. What becomes of a token is
`plain`'s. Both are tested on CPUs only: flex without its compiler, the packing with a loop in place of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from .plain import Attend, attend
from .slots import PAGE, SlotLayer

HALF = (torch.float16, torch.bfloat16)


def attention_for(pool: Tensor) -> Attend:
    """What attends over pages on that device and of that dtype; whole tensors where no kernel reads pages."""
    if pool.device.type != "cuda":
        return attend
    if pool.dtype in HALF and pool.shape[-1] % 8 == 0 and pool.shape[-1] <= 256 and varlen() is not None:
        return packed
    return flex if "compute_q_blocks" in signature(BlockMask.from_kv_blocks).parameters else attend


def flex(query: Tensor, slots: SlotLayer, scaling: float) -> Tensor:
    """See `plain.attend`."""
    batch, heads, group, dim = query.shape
    keys, values = (pool.view(1, 1, -1, dim) for pool in (slots.keys, slots.values))
    rows = query.reshape(batch * heads, 1, group, dim)
    out = _flex(rows.device.type)(rows, keys, values, block_mask=pages_of(slots, group), scale=scaling)
    return out.view_as(query)


def pages_of(slots: SlotLayer, group: int) -> BlockMask:
    """Which pages of the pool each head of each sequence reads, for `group` queries: whole ones, and its last one if
    that is not full."""
    table, length = slots.table.flatten(0, 1), slots.length.flatten()
    rows, columns = table.shape
    pages, held = len(slots.keys), -(-length // PAGE)
    column = torch.arange(columns, device=table.device)
    place = torch.where(column < held.unsqueeze(1), table, pages).flatten()  # unused columns: behind the last page
    row = torch.arange(rows, device=table.device)
    owner = torch.full((pages + 1,), -1, device=table.device).scatter(0, place, row.repeat_interleave(columns))
    first = torch.zeros_like(owner).scatter(0, place, (column * PAGE).repeat(rows))

    def sees(row: Tensor, head: Tensor, query: Tensor, at: Tensor) -> Tensor:
        page = at // PAGE
        return (owner[page] == row) & (first[page] + at % PAGE < length[row])

    last = table.gather(1, (held - 1).clamp_min(0).unsqueeze(1)).expand_as(table)
    shape = (rows, 1, 1, columns)
    return BlockMask.from_kv_blocks(
        (length % PAGE > 0).int().view(rows, 1, 1),
        last.int().reshape(shape),
        (length // PAGE).int().view(rows, 1, 1),
        table.int().view(shape),
        BLOCK_SIZE=(128, PAGE),
        mask_mod=sees,
        seq_lengths=(group, pages * PAGE),
        compute_q_blocks=False,
    )


def packed(query: Tensor, slots: SlotLayer, scaling: float) -> Tensor:
    """See `plain.attend`."""
    batch, heads, group, dim = query.shape
    length, device = slots.length.flatten(), query.device
    line = (slots.table.unsqueeze(-1) * PAGE + torch.arange(PAGE, device=device)).view(batch * heads, -1)
    line = line[torch.arange(line.shape[1], device=device) < length.unsqueeze(1)]
    keys, values = (pool.flatten(0, 1)[line].unsqueeze(1) for pool in (slots.keys, slots.values))
    starts = torch.arange(batch * heads + 1, dtype=torch.int32, device=device)
    ends = pad(length.cumsum(0), (1, 0)).int()
    kernel: Any = varlen()
    out = kernel(query.reshape(-1, group, dim), keys, values, starts, ends, 1, int(length.max()), scaling)
    return out.view_as(query)


@lru_cache
def varlen() -> Callable[..., Tensor] | None:
    """Flash attention, None where there is none: of queries `[sum of lengths, heads, dim]`, keys and values `[sum of
    lengths, 1, dim]`, where each row starts `[rows + 1]`, the longest row, both for queries and keys, and scaling."""
    if find_spec("flash_attn") is not None:
        flash = import_module("flash_attn").flash_attn_varlen_func
        return lambda *states: flash(*states[:-1], softmax_scale=states[-1])
    if find_spec("torch.nn.attention.varlen") is None:
        return None
    of_torch = import_module("torch.nn.attention.varlen").varlen_attn
    if not {"scale", "enable_gqa"} <= signature(of_torch).parameters.keys():
        return None
    return lambda *states: of_torch(*states[:-1], scale=states[-1], enable_gqa=True)


@lru_cache
def _flex(device: str) -> Any:
    """Compiled once per number of rows where there is a compiler for it, else step by step in whole tensors."""
    return flex_attention if device == "cpu" else torch.compile(flex_attention)
