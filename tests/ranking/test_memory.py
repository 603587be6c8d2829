"""What ranking holds does not grow with the text: bytes of live tensors, not of the process, are counted."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nestling.ranking import rank
from nestling.ranking.aggregate import Aggregate
from tests.models import tiny, token_batches


class Held(TorchDispatchMode):
    """Bytes of storages that operations made and that live still: `now`, and at most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage(), given)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def held(batches: int) -> tuple[int, int]:
    """Bytes at most while ranking so many batches, and bytes that the ranking leaves."""
    model, text = tiny("llama", dtype=torch.float32), token_batches(count=batches, batch=2, seq=32)
    with Held() as mode:
        ranking = rank(model, text)
    assert ranking.info["tokens"] == batches * 64
    return mode.peak, mode.now


def test_more_text_needs_no_more_memory():
    few, many = held(2), held(16)
    assert few == many


def test_what_is_kept_for_each_batch_shows(monkeypatch: pytest.MonkeyPatch):
    kept, add = [], Aggregate.add

    def keeping(self, values, mask=None):
        kept.append(values)
        add(self, values, mask)

    monkeypatch.setattr(Aggregate, "add", keeping)
    few = held(2)
    kept.clear()
    assert held(16)[0] > few[0]
