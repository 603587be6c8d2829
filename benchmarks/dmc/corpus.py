"""Rows that need far context: text of the standard library with pairs to be remembered strewn into it, and drills.

A row of text holds `PAIRS` pairs (key token, value token) in its first part and, in its last part, the same keys in
another order, each to be followed by its value. Keys and values are single tokens that occur nowhere else, drawn anew
for every row, so the only way to know a value is to look fifty to `CONTEXT` tokens back: the share of values that come
out right is the recall of a model. From such rows alone a small model learns text and no recall, within millions of
tokens. So half of the training rows are drills in which only what can be known counts: random sequences, each over and
over (`repeats`), and pairs that are asked for again and again as soon as they have been told (`lists`), near at first
and farther the longer the row gets.
"""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nestling.data.documents import documents
from nestling.data.vocabulary import train_tokenizer
from nestling.train import IGNORE

CONTEXT, PAIRS, NAMES = 512, 24, 64
TEXT = 1024  # tokens of text
KEYS, VALUES = TEXT, TEXT + NAMES
VOCAB = TEXT + 2 * NAMES
END = 0  # parts documents
DRILLS = 0.5  # of the training rows
CHARACTERS = {"train": 8_000_000, "validation": 1_500_000}
KEPT = Path("runs/dmc-quality/text")


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    """`TEXT` tokens learned on the training part."""
    return train_tokenizer("builtin:stdlib", TEXT, characters=2_000_000)


@lru_cache
def text(split: str) -> Tensor:
    """The split's documents one after another, parted by `END`; kept on disk, since reading them takes a while."""
    path = KEPT / f"{split}.safetensors"
    if not path.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file({"text": _read(split)}, path)
    return load_file(path)["text"].long()


def _read(split: str) -> Tensor:
    parts: list[int] = []
    taken = 0
    for document in documents("builtin:stdlib", split, seed=0):
        piece = "".join(islice(document, 20_000))
        parts += [*tokenizer()(piece)["input_ids"], END]
        taken += len(piece)
        if taken >= CHARACTERS[split]:
            break
    return torch.tensor(parts, dtype=torch.int16)


def held_out(count: int, seed: int = 99) -> tuple[Tensor, Tensor]:
    """Rows of text with pairs `[count, CONTEXT]`, and whether each token is a value to be recalled."""
    generator = random.Random(seed)
    found = [_strewn("validation", generator) for _ in range(count)]
    return torch.stack([ids for ids, _ in found]), torch.stack([asked for _, asked in found])


def training(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of text and of drills `[count, CONTEXT]`, and their labels: `IGNORE` for what nobody could know."""
    generator = random.Random(seed)
    ids = torch.empty(count, CONTEXT, dtype=torch.long)
    labels = torch.empty_like(ids)
    for row in range(count):
        drill = generator.choice((repeats, lists)) if generator.random() < DRILLS else None
        ids[row], known = drill(generator) if drill else (_strewn("train", generator)[0], None)
        labels[row] = ids[row] if known is None else torch.where(known, ids[row], IGNORE)
    return ids, labels


def repeats(generator: random.Random) -> tuple[Tensor, Tensor]:
    """Random sequences of any tokens, each over and over; known is all but the first time and its first token again."""
    ids: list[int] = []
    known: list[bool] = []
    while len(ids) < CONTEXT:
        length, times = generator.randint(4, 128), generator.randint(2, 4)
        ids += generator.choices(range(1, VOCAB), k=length) * times
        known += [False] * (length + 1) + [True] * (length * (times - 1) - 1)
    return torch.tensor(ids[:CONTEXT]), torch.tensor(known[:CONTEXT])


def lists(generator: random.Random) -> tuple[Tensor, Tensor]:
    """Pairs, told and asked for in turn; known are the values that are asked for."""
    keys, values = (generator.sample(range(NAMES), NAMES) for _ in range(2))
    every = generator.choice((2, 4, 8))  # one in so many is told, the others are asked for
    told, ids, known = 0, [], []
    while len(ids) < CONTEXT:
        new = told < NAMES and (told == 0 or generator.randrange(every) == 0)
        pair = told if new else generator.randrange(told)
        told += new
        ids += [KEYS + keys[pair], VALUES + values[pair]]
        known += [False, not new]
    return torch.tensor(ids), torch.tensor(known)


def _strewn(split: str, generator: random.Random) -> tuple[Tensor, Tensor]:
    source = text(split)
    start = generator.randrange(len(source) - CONTEXT)
    ids, recalled = source[start : start + CONTEXT].clone(), torch.zeros(CONTEXT, dtype=torch.bool)
    keys, values = (generator.sample(range(NAMES), PAIRS) for _ in range(2))
    told = sorted(generator.sample(range(0, CONTEXT * 6 // 10, 2), PAIRS))
    asked = sorted(generator.sample(range(CONTEXT * 7 // 10, CONTEXT - 1, 2), PAIRS))
    order = generator.sample(range(PAIRS), PAIRS)
    for places, pairs in ((told, range(PAIRS)), (asked, order)):
        for place, pair in zip(places, pairs, strict=True):
            ids[place], ids[place + 1] = KEYS + keys[pair], VALUES + values[pair]
    recalled[[place + 1 for place in asked]] = True
    return ids, recalled
