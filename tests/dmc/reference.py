"""DMC token by token, head by head, with Python lists: slow, obvious, and written from the paper's equations alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nestling.dmc.runtime.gates import EPS, Gates
from nestling.dmc.runtime.heads import Heads, Text

BASE = 50.0  # a fast rotation, so that a wrong position shows


def rotate_one(vector: Tensor, position: int) -> Tensor:
    """Half-split rotary embedding of one vector `[dim]`."""
    half = len(vector) // 2
    angle = position * BASE ** (-torch.arange(half, dtype=vector.dtype) * 2 / len(vector))
    first, second = vector[:half], vector[half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])


def rotation(start: int, seq: int):
    """The same for queries and keys `[batch, heads, seq, dim]` at positions from `start`."""

    def rotate(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.stack([rotate_one_all(states[..., t, :], start + t) for t in range(seq)], -2)
            for states in (query, key)
        )

    return rotate


def rotate_one_all(states: Tensor, position: int) -> Tensor:
    flat = states.reshape(-1, states.shape[-1])
    return torch.stack([rotate_one(vector, position) for vector in flat]).view_as(states)


def angles(start: int, seq: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the same rotation `[1, seq, dim]`."""
    half = BASE ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)
    found = torch.arange(start, start + seq, dtype=torch.float64).unsqueeze(1) * half
    both = torch.cat([found, found], -1).unsqueeze(0)
    return both.cos().to(dtype), both.sin().to(dtype)


def random_heads(batch=2, heads=2, group=2, seq=20, dim=6, seed=0, dtype=torch.float64) -> Heads:
    """Random queries, keys and values whose gates are open about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, group, seq, dim, generator=generator, dtype=dtype)
    key, value = (torch.randn(batch, heads, seq, dim, generator=generator, dtype=dtype) for _ in range(2))
    return Heads(query, key, value, rotation(0, seq), 1 / math.sqrt(dim))


def cut(heads: Heads, start: int, stop: int) -> Heads:
    """Tokens `start` to `stop` of the same text."""
    return Heads(
        heads.query[..., start:stop, :],
        heads.key[..., start:stop, :],
        heads.value[..., start:stop, :],
        rotation(start, stop - start),
        heads.scaling,
        angles(start, stop - start, heads.key.shape[-1], heads.key.dtype),
    )


def all_text(heads: Heads, pads=(), ends=()) -> Text:
    """Left padding of `pads[b]` tokens, and separators at (row, position)."""
    shape = (heads.key.shape[0], heads.key.shape[2])
    valid, parts = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, count in enumerate(pads):
        valid[row, :count] = False
    for row, position in ends:
        parts[row, position] = True
    return Text(valid, parts)


def decode_slowly(heads: Heads, gates: Gates, text: Text, rotate_before_mean: bool = False) -> tuple[Tensor, list]:
    """Outputs `[batch, heads, group, seq, dim]` and slot counts; `rotate_before_mean` is a mistake, for controls."""
    batch, count, group, seq, _ = heads.query.shape
    out, lengths = torch.zeros_like(heads.query), [[0] * count for _ in range(batch)]
    for b in range(batch):
        for h in range(count):
            slots: list[list] = []  # of (weight, key, value, position) lists
            border = True
            for t in range(seq):
                if not text.valid[b, t]:
                    continue
                weight, merges = _gate(heads, gates, b, h, t)
                end = bool(text.ends[b, t])
                if border or end or not merges:
                    slots.append([])
                slots[-1].append((weight, heads.key[b, h, t], heads.value[b, h, t], t))
                border = end
                for g in range(group):
                    out[b, h, g, t] = _attend(heads, b, h, g, t, slots, gates, rotate_before_mean)
            lengths[b][h] = len(slots)
    return out, lengths


def _gate(heads: Heads, gates: Gates, b: int, h: int, t: int) -> tuple[float, bool]:
    channel = heads.key[b, :, t, -1].mean() if gates.shared else heads.key[b, h, t, -1]
    omega = gates.scale * heads.query[b, h, :, t, -1].mean() + gates.offset
    return 1 / (1 + math.exp(-omega)) + EPS, bool(gates.scale * channel > gates.offset)


def _attend(heads: Heads, b: int, h: int, g: int, t: int, slots: list, gates: Gates, early: bool) -> Tensor:
    scores, values = [], []
    query = _blind(rotate_one(_blind(heads.query[b, h, g, t]), t))
    for slot in slots:
        total = sum(weight for weight, *_ in slot)
        if early:
            key = sum(w * rotate_one(_blind(k), p) for w, k, _, p in slot) / total
        else:
            key = rotate_one(_blind(sum(w * k for w, k, *_ in slot) / total), slot[-1][3])
        scores.append((query @ _blind(key)) * heads.scaling)
        values.append(sum(w * v for w, _, v, _ in slot) / total)
    return torch.softmax(torch.stack(scores), 0) @ torch.stack(values)


def _blind(vector: Tensor) -> Tensor:
    return torch.cat([vector[:-1], torch.zeros(1, dtype=vector.dtype)])
