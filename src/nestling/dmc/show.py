"""Which tokens share a slot: the decisions of every layer and head on one text, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.anatomy import decoder
from nestling.anatomy.bypass import evaluating
from nestling.dmc.convert import is_converted
from nestling.dmc.runtime.modeling import recording
from nestling.errors import DataError, NestlingError


@dataclass(frozen=True)
class Merges:
    """A text as tokens, and for each layer and head which of them opened a slot; the others joined the one before, or
    with `dropped` are gone at the end."""

    tokens: tuple[str, ...]
    opened: dict[int, tuple[tuple[bool, ...], ...]]
    dropped: bool = False

    def ratio(self, layer: int, head: int) -> float:
        """Tokens per slot of one head."""
        return len(self.tokens) / sum(self.opened[layer][head])

    @property
    def whole(self) -> float:
        """Tokens per slot over everything."""
        heads = [head for layer in self.opened.values() for head in layer]
        return len(self.tokens) * len(heads) / sum(sum(head) for head in heads)

    def slots(self, layer: int, head: int) -> list[str]:
        """The text of each slot of one head, in order; dots before it where tokens were dropped."""
        found: list[str] = []
        gap = ""
        for token, opens in zip(self.tokens, self.opened[layer][head], strict=True):
            if opens:
                found.append(gap + token)
                gap = ""
            elif self.dropped:
                gap = "…"
            else:
                found[-1] += token
        return found


def merges(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Merges:
    """The decisions of a converted model on a text.

    Raises `NestlingError` for a model without gates and `DataError` for a text without tokens.
    """
    if not is_converted(model):
        raise NestlingError("this model's cache is not compressed: retrofit it first")
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise DataError("the text has no tokens: give at least a word")
    with evaluating(model), recording(model) as decisions:
        decoder(model)(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    layers = [layer for layer, kind in enumerate(model.config.dmc_layers) if kind is not None]
    dropped = model.config.dmc.get("method") == "dms"  # then a decision is about the token before
    opened = {
        layer: tuple(tuple(head) for head in (~found.quiet[0].roll(-dropped, -1)).tolist())
        for layer, found in zip(layers, decisions, strict=True)
    }
    return Merges(tuple(str(tokenizer.decode([token])) for token in ids), opened, dropped)
