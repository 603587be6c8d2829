"""Rows that need far context: text of the standard library in bytes, with pairs to be remembered strewn into it.

A row holds `PAIRS` pairs (key token, value token) in its first part and, in its last part, the same keys again in
another order, each to be followed by its value. Keys and values are single tokens that occur nowhere else, drawn anew
for every row, so the only way to know a value is to look fifty to `CONTEXT` tokens back.
"""

from __future__ import annotations

import random
from itertools import islice

import torch
from torch import Tensor

from nestling.data.documents import documents

CONTEXT, PAIRS, NAMES = 512, 16, 64
KEYS, VALUES, END = 256, 256 + NAMES, 256 + 2 * NAMES
VOCAB = END + 1


def text_bytes(split: str, amount: int, seed: int) -> Tensor:
    """About `amount` bytes of the split's documents, in shuffled order."""
    parts: list[int] = []
    for document in documents("builtin:stdlib", split, seed=seed):
        parts += islice(document.encode(), 20_000)
        if len(parts) >= amount:
            break
    return torch.tensor(parts)


def rows(split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens `[count, CONTEXT]`, and whether each is a value to be recalled."""
    generator, source = random.Random(seed), text_bytes(split, 4_000_000, seed)
    ids, recalled = torch.empty(count, CONTEXT, dtype=torch.long), torch.zeros(count, CONTEXT, dtype=torch.bool)
    for row in range(count):
        start = generator.randrange(len(source) - CONTEXT)
        ids[row] = source[start : start + CONTEXT]
        _strew(ids[row], recalled[row], generator)
    return ids, recalled


def _strew(ids: Tensor, recalled: Tensor, generator: random.Random) -> None:
    keys, values = (generator.sample(range(NAMES), PAIRS) for _ in range(2))
    told = sorted(generator.sample(range(0, CONTEXT * 6 // 10, 2), PAIRS))
    asked = sorted(generator.sample(range(CONTEXT * 7 // 10, CONTEXT - 1, 2), PAIRS))
    order = generator.sample(range(PAIRS), PAIRS)
    for places, pairs in ((told, range(PAIRS)), (asked, order)):
        for place, pair in zip(places, pairs, strict=True):
            ids[place], ids[place + 1] = KEYS + keys[pair], VALUES + values[pair]
    recalled[[place + 1 for place in asked]] = True
