"""`Family`: one sorted parent, and named members that are views of it.

On disk it is the parent's checkpoint, which any tool can load, with `family.json` beside it: the order of the layers
and, for each member, its shape and whether it was trained. `family["0.5x"]` is a runnable model on its storage,
`family.extract("0.5x")` one of its own. A budget that no member was trained for gets a shape between its neighbours'.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from nestling import hub
from nestling.anatomy import Anatomy, cache_name
from nestling.cost import Cost, cost_of_form
from nestling.elastic.between import between
from nestling.elastic.handover import handover
from nestling.elastic.member import Member
from nestling.elastic.settings import WHOLE
from nestling.errors import CheckpointError, TargetError
from nestling.shape import Shape
from nestling.surgery.choose import Selection, choose, prefix_ranking
from nestling.surgery.cut import assemble, sliced

FILE = "family.json"


@dataclass(frozen=True)
class Entry:
    """A member on paper. trained: whether it learned; otherwise its shape lies between those that did."""

    shape: Shape
    trained: bool = True


class Family(Mapping[str, PreTrainedModel]):
    """A parent and its members, by budget; `1x` is the parent itself.

    parent: sorted; its units are in order of importance. entries: the members' shapes. order: its layers, most
    important first. info: how it came about, plain values.
    """

    def __init__(
        self,
        parent: PreTrainedModel,
        entries: Mapping[str, Entry],
        order: Sequence[int],
        info: Mapping[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.parent, self.entries, self.order = parent, dict(entries), list(order)
        self.info, self.tokenizer = dict(info or {}), tokenizer
        self.anatomy = Anatomy.of(parent)
        self._members: dict[str, Member] = {}

    def __getitem__(self, name: str) -> PreTrainedModel:
        """The member as a model in eval mode whose weights are views of the parent's.

        Raises `TargetError` for a name that is neither a member nor a budget that one can be made for.
        """
        return self.parent if name == WHOLE else self._member(name).model

    def __iter__(self) -> Iterator[str]:
        return iter([WHOLE, *self.entries])

    def __len__(self) -> int:
        return 1 + len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name == WHOLE or name in self.entries

    def entry(self, name: str) -> Entry:
        """A member's shape; for a budget that was not trained, one between those that were."""
        if name == WHOLE:
            return Entry(Shape())
        if name in self.entries:
            return self.entries[name]
        known = [entry.shape for entry in self.entries.values() if entry.trained]
        context = int(self.info.get("cost_context", 4096))
        return Entry(between(self.anatomy, self.order, known, name, context), trained=False)

    def selection(self, name: str) -> Selection:
        """The units of the parent that a member has: the first of every axis."""
        return choose(self.anatomy, sorted_order(self.anatomy, self.order), self.entry(name).shape)

    def cost(self, name: str, context: int = 4096, batch: int = 1) -> Cost:
        """What a member costs."""
        return cost_of_form(self.anatomy, self.selection(name).form, context, batch)

    def extract(self, name: str) -> PreTrainedModel:
        """A member as a plain transformers model with weights of its own."""
        selection = self.selection(name)
        child = assemble(self.parent, selection, sliced(self.parent.state_dict(), selection))
        child.config.nestling_member = {"budget": name, "trained": self.entry(name).trained}
        return child.eval()

    def generate(self, input_ids: LongTensor, member: str = WHOLE, prefill: str | None = None, **options: Any) -> Any:
        """`generate` with a member; the prompt may be read by another one, whose cache is handed over.

        input_ids: `[batch, seq]`. options: as `generate` takes them. Raises `ShapeError` when the one's cache does not
        hold what the other needs.
        """
        model = cast(Any, self[member])
        if prefill is None or prefill == member or input_ids.shape[1] < 2:
            return model.generate(input_ids, **options)
        mask = options.get("attention_mask")
        with torch.no_grad():
            read = self[prefill](
                input_ids=input_ids[:, :-1], attention_mask=None if mask is None else mask[:, :-1], use_cache=True
            )
        cache = self.handover(read[cache_name(self[prefill])], prefill, member)
        return model.generate(input_ids, **{cache_name(model): cache}, **options)

    def handover(self, cache: Cache, before: str, after: str) -> Cache:
        """The cache that `before` has filled, as `after` reads it; the old one stays as it is."""
        return handover(cache, self.selection(before), self.selection(after), self[after].config)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the parent's checkpoint and `family.json`, whole or not at all. Raises `CheckpointError`."""
        members = {
            name: {"shape": entry.shape.to_dict(), "trained": entry.trained} for name, entry in self.entries.items()
        }
        record = {"format": 1, "order": self.order, "members": members, "info": self.info}
        beside = {FILE: json.dumps(record, indent=1) + "\n"}
        return hub.save(self.parent, folder, self.tokenizer, overwrite=overwrite, beside=beside)

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Family:
        """Read what `save` wrote; a run folder's `family/` is found too.

        options: dtype, device and trust_remote_code, as `nestling.load` takes them. Raises `CheckpointError`.
        """
        place = next((p for p in (Path(folder), Path(folder) / "family") if (p / FILE).exists()), None)
        if place is None:
            raise CheckpointError(f"'{folder}' holds no family: there is no {FILE} in it, make one with elastic train")
        order, entries, info = _record(place / FILE)
        parent, tokenizer = hub.load(place, **options)
        if sorted(order) != list(range(Anatomy.of(parent).num_layers)):
            raise CheckpointError(f"'{place / FILE}' is not of this model: it orders {len(order)} layers")
        return cls(parent.requires_grad_(False), entries, order, info, tokenizer)

    def _member(self, name: str) -> Member:
        if name not in self._members:
            self._members[name] = Member(self.parent, self.selection(name))
        return self._members[name]


def sorted_order(anatomy: Anatomy, order: Sequence[int]) -> Any:
    """The ranking of a sorted parent whose layers are in this order of importance."""
    scores = -torch.as_tensor(order).argsort().float()
    return prefix_ranking(anatomy, scores)


def _record(path: Path) -> tuple[list[int], dict[str, Entry], dict[str, Any]]:
    try:
        record = json.loads(path.read_text())
        entries = {
            name: Entry(Shape(**member["shape"]), bool(member["trained"])) for name, member in record["members"].items()
        }
        return [int(layer) for layer in record["order"]], entries, dict(record["info"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, TargetError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}): train the family anew") from error


def tensors_of(family: Family) -> Iterator[Tensor]:
    """Every tensor that the parent or a member holds; most share their storage."""
    yield from family.parent.state_dict().values()
    for name in family.entries:
        yield from family[name].state_dict().values()
