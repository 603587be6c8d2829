"""Rows that need far context: text of the standard library with facts to be remembered strewn into it, and drills.

A row of text holds facts in its first part and asks for some of them, in another order, in its last part. A fact is
one token that stands for a key and its value; a question is the token of the key, and the answer is the fact again.
Facts are drawn anew for every row, so the only way to answer is to look fifty to `CONTEXT` tokens back: the share of
answers that come out right is the recall of a model. Half of the rows hold few facts, `FACTS`: needles, for which a
cache with a quarter of the slots has room if it knows them. The others are crowded: `CROWD` facts, any of which may be
asked for, are a third of the row and more than the text around them, so nothing stands out, and a head that recalls
needs more slots than its share.

A part of the training rows are drills: facts that are asked for again and again as soon as they have been told, near
at first and farther the longer the row gets; only answers count. Recall begins with drills of short rows (`near`):
there it comes within 0.2 million tokens and stays when rows get long and full of text, which alone had not begun to
teach it after 0.8 million. Facts of two tokens (key, then value) would be the harder task, since it needs two layers
that work together: models of this size had not begun to learn it after three million tokens, nor to go on with random
tokens that repeat after one million, even with a first head that was made to look at the token before.
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

CONTEXT, FACTS, CROWD = 512, 24, 160
NAMES, VALUES = 192, 8  # keys, and values that each may have
TEXT = 1024  # tokens of text; then come the keys, then the facts
ASK, TELL = TEXT, TEXT + NAMES
VOCAB = TELL + NAMES * VALUES
END = 0  # parts documents
DRILLS = 0.25  # of the training rows
NEAR, FEW = 64, 8  # tokens of a row, and its facts, with which recall begins
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
    """Rows of text with facts `[count, CONTEXT]`, few and crowded in turns, and whether each token is an answer."""
    generator = random.Random(seed)
    found = [_strewn("validation", generator, (FACTS, CROWD)[row % 2]) for row in range(count)]
    return torch.stack([ids for ids, _ in found]), torch.stack([asked for _, asked in found])


def training(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of text and of drills `[count, CONTEXT]`, and their labels: `IGNORE` for what nobody could know."""
    generator = random.Random(seed)
    ids = torch.empty(count, CONTEXT, dtype=torch.long)
    labels = torch.empty_like(ids)
    for row in range(count):
        facts = generator.choice((FACTS, CROWD))
        drilled = generator.random() < DRILLS
        ids[row], known = _drill(generator, CONTEXT, facts) if drilled else _strewn("train", generator, facts)
        labels[row] = torch.where(known | (ids[row] < TEXT), ids[row], IGNORE)
    return ids, labels


def near(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drills of short rows with few facts `[count, NEAR]`, and their labels: all but answers is `IGNORE`."""
    generator = random.Random(seed)
    rows = [_drill(generator, NEAR, FEW) for _ in range(count)]
    ids, known = (torch.stack(part) for part in zip(*rows, strict=True))
    return ids, torch.where(known, ids, IGNORE)


def _drill(generator: random.Random, length: int, most: int) -> tuple[Tensor, Tensor]:
    facts = _facts(generator, most)
    every = generator.choice((2, 4, 8))  # one in so many is told, the others are asked for
    told, ids, known = 0, [], []
    while len(ids) < length:
        new = told < len(facts) and (told == 0 or generator.randrange(every) == 0)
        if new:
            ids += [TELL + facts[told]]
            told += 1
        else:
            fact = generator.choice(facts[:told])
            ids += [ASK + fact // VALUES, TELL + fact]
        known += [False] if new else [False, True]
    return torch.tensor(ids[:length]), torch.tensor(known[:length])


def _strewn(split: str, generator: random.Random, count: int) -> tuple[Tensor, Tensor]:
    source = text(split)
    start = generator.randrange(len(source) - CONTEXT)
    ids, answers = source[start : start + CONTEXT].clone(), torch.zeros(CONTEXT, dtype=torch.bool)
    facts = _facts(generator, count)
    for place, fact in zip(generator.sample(range(CONTEXT * 6 // 10), count), facts, strict=True):
        ids[place] = TELL + fact
    asked = sorted(generator.sample(range(CONTEXT * 7 // 10, CONTEXT - 1, 2), FACTS))
    for place, fact in zip(asked, generator.sample(facts, FACTS), strict=True):
        ids[place], ids[place + 1] = ASK + fact // VALUES, TELL + fact
        answers[place + 1] = True
    return ids, answers


def _facts(generator: random.Random, count: int) -> list[int]:
    """Keys with a value each, as one number."""
    return [key * VALUES + generator.randrange(VALUES) for key in generator.sample(range(NAMES), count)]
