"""The notation in which an architecture writes down its tensors, and the arithmetic that follows from it.

A tensor is a row of dimensions, a dimension a sum of products of letters, in the spirit of einops:

    "(kv q d) hidden"               rows: for every KV group, for every query head in it, its channels
    "(ffn + ffn) hidden"            rows: two parts one after the other, gate and up
    "(g h p + g h p + g n) 1 k"     parts that share letters move together

    "(k (d + d + v))"               a sum inside a product: every unit of k has its own d, d and v, one after another
    "experts (ffn + ffn) hidden"    units chosen inside each expert: one row of elements per kept expert

Every letter is an axis with a size. Choosing units of some axes (`Choice`) chooses the elements of every
dimension in which they occur: `Dimension.index` is the only place where that arithmetic is done. This file knows
neither models nor configs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from nestling.errors import NestlingError

_TOKEN = re.compile(r"\((?:[^()]|\([^()]*\))*\)|[^\s()]+")
_NESTED = re.compile(r"([^()+]+)\(([^()]+)\)\Z")
_LETTER = re.compile(r"[a-z_]+\Z|[0-9]+\Z")


@dataclass(frozen=True)
class Choice:
    """Units of one letter that are kept, in the order in which they shall stand.

    `units` is a LongTensor `[n]`, or `[*outer, n]` when the choice differs between the units of the letters in
    `within`: for query heads within KV groups, `units[i]` are the heads kept in the i-th kept group.
    """

    units: Tensor
    within: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.units.dim() != len(self.within) + 1:
            raise ValueError(f"a choice within {self.within} has {len(self.within) + 1} dimensions")

    @property
    def count(self) -> int:
        """How many units are kept (in each group)."""
        return self.units.shape[-1]


Choices = Mapping[str, Choice]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor: products of letters, one after another.

    lead: letters that all products begin with, if they stand one after another for each unit of those anew.
    """

    parts: tuple[tuple[str, ...], ...]
    lead: tuple[str, ...] = ()

    @property
    def letters(self) -> frozenset[str]:
        return frozenset(letter for part in self.parts for letter in part)

    def size(self, sizes: Sizes) -> int:
        """Number of elements when each letter has the size given."""
        return sum(math.prod(_size(letter, sizes) for letter in part) for part in self.parts)

    def index(self, choices: Choices, sizes: Sizes, first: Dimension | None = None) -> LongTensor | None:
        """Elements that the choice of units keeps, as a LongTensor; None when no letter here is chosen from.

        `sizes` are the sizes before the choice. first: the tensor's first dimension, if this is another one. Where
        units are chosen within its letters, the result is `[kept elements of the first dimension, n]`.
        """
        if not any(letter in choices for letter in self.letters):
            return None
        outer = self._outer(choices, first)
        before = outer or self.lead
        rows = math.prod(choices[letter].count if letter in choices else _size(letter, sizes) for letter in before)
        blocks, start = [], 0
        for part in self.parts:
            length = math.prod(_size(letter, sizes) for letter in part[len(self.lead) :])
            index = _part_index((*outer, *part), choices, sizes)
            blocks.append(start + index.view(rows, -1) % length)
            start += length
        index = torch.cat(blocks, dim=-1)
        if self.lead:
            index = index + _part_index(self.lead, choices, sizes)[:, None] * start
        return index if outer else index.flatten()  # type: ignore[return-value]

    def _outer(self, choices: Choices, first: Dimension | None) -> tuple[str, ...]:
        """The letters of the tensor's first dimension, if units of this one are chosen within them."""
        if first is None or first is self or len(first.parts) != 1:
            return ()
        within = {outer for letter in self.letters if letter in choices for outer in choices[letter].within}
        return first.parts[0] if within - self.letters else ()

    def joined(self, lines: list[Tensor], sizes: Sizes) -> Tensor:
        """One value for each element, in the order of the elements, from the values of each product's elements."""
        rows = math.prod(_size(letter, sizes) for letter in self.lead)
        return torch.cat([line.view(rows, -1) for line in lines], dim=-1).flatten()

    def unit_view(self, letters: tuple[str, ...], sizes: Sizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How to see a dimension of one part by units: `(view, inside)`.

        Reshaped to `view`, the positions in `inside` are what belongs to one unit; the others are `letters`, in order.
        """
        if len(self.parts) != 1:
            raise ValueError(f"'{self}' has several parts and no single view by units")
        part = self.parts[0]
        return tuple(_sized(part, sizes)), tuple(i for i, letter in enumerate(part) if letter not in letters)

    def owner(self, letters: tuple[str, ...], sizes: Sizes) -> LongTensor:
        """For each element the unit it belongs to, counted through `letters`, outer first; -1 in parts without them."""
        owners = []
        for part in self.parts:
            length = math.prod(_size(letter, sizes) for letter in part)
            if all(letter in part for letter in letters):
                owners.append(_part_index(letters, {}, sizes).view(_sized(letters, sizes)))
                owners[-1] = _broadcast(owners[-1], letters, part, sizes)
            else:
                owners.append(torch.full((length,), -1))
        return self.joined(owners, sizes)  # type: ignore[return-value]

    def __str__(self) -> str:
        text = " + ".join(" ".join(part[len(self.lead) :]) for part in self.parts)
        if self.lead:
            return f"({' '.join(self.lead)} ({text}))"
        return f"({text})" if len(self.parts) > 1 or len(self.parts[0]) > 1 else text


Layout = tuple[Dimension, ...]


def kept_elements(layout: Layout, choices: Choices, sizes: Sizes) -> tuple[LongTensor | None, ...]:
    """For each dimension of a tensor the elements that a choice keeps (see `Dimension.index`); None where all stay."""
    return tuple(dimension.index(choices, sizes, layout[0]) for dimension in layout)


def take(tensor: Tensor, index: tuple[LongTensor | None, ...]) -> Tensor:
    """The elements of a tensor that `kept_elements` names, as a tensor of their own."""
    kept = tensor
    for dim, elements in enumerate(index):
        if elements is None:
            continue
        chosen: Tensor = elements.to(tensor.device)
        if chosen.dim() == 1:
            kept = kept.index_select(dim, chosen)
        else:  # other elements for each element of the first dimension
            shape = [1] * kept.dim()
            shape[0], shape[dim] = chosen.shape
            kept = torch.take_along_dim(kept, chosen.view(shape), dim)
    return kept.clone() if kept is tensor else kept


def parse(spec: str) -> Layout:
    """Read `"(kv q d) hidden"` into its dimensions. Raises `NestlingError` on a spec that is not of the notation."""
    tokens = _TOKEN.findall(spec)
    if "".join(tokens).replace(" ", "") != spec.replace(" ", "") or not tokens:
        raise NestlingError(f"'{spec}' is not a tensor spec: use words and (a b + c) groups, as in '(kv q d) hidden'")
    return tuple(_dimension(token[1:-1] if token[0] == "(" else token, spec) for token in tokens)


def _dimension(text: str, spec: str) -> Dimension:
    nested = _NESTED.match(text.strip())
    lead = tuple(nested[1].split()) if nested else ()
    parts = tuple((*lead, *part.split()) for part in (nested[2] if nested else text).split("+"))
    if not all(part and all(_LETTER.match(letter) for letter in part) for part in parts):
        raise NestlingError(f"'{text}' in the tensor spec '{spec}' is not a sum of products of lower-case words")
    return Dimension(parts, lead)


def _size(letter: str, sizes: Sizes) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


def _part_index(part: tuple[str, ...], choices: Choices, sizes: Sizes) -> Tensor:
    """Flat positions inside one product: the kept unit of each letter, weighted by the stride of that letter."""
    index = torch.zeros([1] * len(part), dtype=torch.long)
    stride = 1
    for position in reversed(range(len(part))):
        letter = part[position]
        size = _size(letter, sizes)
        choice = choices.get(letter) or Choice(torch.arange(size))
        index = index + _spread(choice, part, position) * stride
        stride *= size
    return index.flatten()


def _sized(letters: tuple[str, ...], sizes: Sizes) -> list[int]:
    return [_size(letter, sizes) for letter in letters]


def _broadcast(units: Tensor, letters: tuple[str, ...], part: tuple[str, ...], sizes: Sizes) -> Tensor:
    """`units`, one dimension per letter, repeated over the product's other letters and flattened."""
    shape = [_size(letter, sizes) if letter in letters else 1 for letter in part]
    return units.reshape(shape).expand(_sized(part, sizes)).flatten()


def _spread(choice: Choice, part: tuple[str, ...], position: int) -> Tensor:
    """The choice's units as a tensor that broadcasts over the product's letters."""
    missing = [letter for letter in choice.within if letter not in part[:position]]
    if missing:
        raise ValueError(f"'{part[position]}' is chosen within {missing}, which do not stand before it in {part}")
    shape = [1] * len(part)
    for dim, letter in enumerate((*choice.within, part[position])):
        shape[part.index(letter) if dim < len(choice.within) else position] = choice.units.shape[dim]
    return choice.units.reshape(shape)
