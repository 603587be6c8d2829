"""Rows in an order that depends on the seed alone, and batches whose targets are shifted and masked."""

from itertools import repeat

import pytest
import torch

from nestling.errors import DataError
from nestling.train import Rows, TrainSettings, collate, rows_of
from nestling.train.rows import IGNORE, shifted


def source(count=5, width=4):
    return [{"input_ids": torch.arange(width) + 10 * i} for i in range(count)]


def first(rows):
    return [int(rows[i]["input_ids"][0]) // 10 for i in range(len(rows))]


def test_first_pass_in_order_then_shuffled_anew():
    order = first(Rows(source(), 15, seed=0))
    assert order[:5] == [0, 1, 2, 3, 4]
    assert sorted(order[5:10]) == sorted(order[10:]) == [0, 1, 2, 3, 4]
    assert order[5:10] != order[10:]
    assert first(Rows(source(), 15, seed=0)) == order
    assert first(Rows(source(), 15, seed=1)) != order
    assert first(Rows(source(), 5, seed=0, shuffle=True)) != [0, 1, 2, 3, 4]


def test_order_does_not_depend_on_where_one_begins():
    rows, again = Rows(source(), 15, seed=0), Rows(source(), 15, seed=0)
    order = first(rows)
    assert [int(again[i]["input_ids"][0]) // 10 for i in (12, 3, 7)] == [order[i] for i in (12, 3, 7)]


def test_endless_batches_are_read_as_far_as_needed():
    endless = repeat({"input_ids": torch.ones(3, 4, dtype=torch.long)})
    rows, length = rows_of(endless, None, TrainSettings(steps=2, batch_size=5), 10)
    assert (len(rows), length) == (10, 4)


def test_targets_by_hand():
    rows = [
        {"input_ids": torch.tensor([5, 6, 7, 8])},
        {"input_ids": torch.tensor([1, 2, 3]), "attention_mask": torch.tensor([0, 1, 1])},
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, -100, 3])},
    ]
    batch = collate(10)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [1, 2, 3, 0], [1, 2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 0], [1, 1, 1, 0]]
    no = IGNORE
    assert batch["labels"].tolist() == [[6, 7, 8, no], [no, 3, no, no], [no, 3, no, no]]


def test_left_padding_is_no_context():
    mask = torch.tensor([[False, False, True, True]])
    assert shifted(torch.tensor([[1, 2, 3, 4]]), mask).tolist() == [[IGNORE, IGNORE, 4, IGNORE]]


@pytest.mark.parametrize("token", [10, -1])
def test_tokens_outside_the_vocabulary_are_refused(token):
    with pytest.raises(DataError, match="vocabulary has 10"):
        collate(10)([{"input_ids": torch.tensor([1, token])}])
