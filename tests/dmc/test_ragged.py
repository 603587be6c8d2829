"""Attention over pages by kernels for other devices, run on a CPU, against whole tensors that are padded."""

import pytest
import torch

from nestling.dmc.runtime import attend, plain, ragged
from nestling.dmc.runtime.ragged import attention_for, flex, packed, pages_of
from nestling.dmc.runtime.slots import PAGE
from tests.dmc.reference import all_text, random_heads
from tests.dmc.test_attend import GATES, filled, in_pieces, real

LENGTHS = torch.tensor([[1, PAGE, 5], [PAGE + 1, 3 * PAGE + 7, 2 * PAGE], [2, 1, 40]])
KERNELS = {"flex": flex, "packed": packed}


def one_by_one(query, keys, values, starts, ends, longest, most, scaling):
    """What flash attention computes of rows of different length, in a loop over rows."""
    out = torch.empty_like(query)
    assert longest == 1
    assert most == int(ends.diff().max())
    for row in range(len(ends) - 1):
        held = slice(int(ends[row]), int(ends[row + 1]))
        mine = query[starts[row] : starts[row + 1]]
        scores = torch.einsum("qhd,kd->qhk", mine, keys[held, 0]) * scaling
        out[row] = scores.softmax(-1)[0] @ values[held, 0]
    return out


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(ragged, "varlen", lambda: one_by_one)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", KERNELS)
def test_heads_of_any_length(name):
    torch.manual_seed(0)
    slots = filled(LENGTHS, 8, torch.float64)
    query = torch.randn(3, 3, 2, 8, dtype=torch.float64)
    found = KERNELS[name](query, slots, 0.4)
    torch.testing.assert_close(found, plain.attend(query, slots, 0.4), atol=1e-12, rtol=0)
    slots.table[1, 1, 0], slots.table[1, 2, 0] = slots.table[1, 2, 0].clone(), slots.table[1, 1, 0].clone()
    changed = (KERNELS[name](query, slots, 0.4) - found).abs().amax((2, 3)) > 1e-6
    assert changed.nonzero().tolist() == [[1, 1], [1, 2]]  # pages of two heads changed places


def test_blocks_are_the_pages_that_are_held():
    slots = filled(LENGTHS, 8)
    mask = pages_of(slots, 2)
    for row, length in enumerate(LENGTHS.flatten().tolist()):
        table = slots.table.flatten(0, 1)[row].tolist()
        whole = int(mask.full_kv_num_blocks[row])
        assert whole == length // PAGE
        assert mask.full_kv_indices[row, 0, 0, :whole].tolist() == table[:whole]
        assert int(mask.kv_num_blocks[row]) == (length % PAGE > 0)
        if length % PAGE:
            assert int(mask.kv_indices[row, 0, 0, 0]) == table[whole]


def test_decoding(monkeypatch):
    heads = random_heads(2, 2, 2, seq=PAGE + 3, dim=6)
    text, cuts = all_text(heads, pads=(0, 2)), [0, PAGE, PAGE + 1, PAGE + 2, PAGE + 3]
    theirs, _ = in_pieces(heads, GATES, text, cuts)
    monkeypatch.setattr(attend, "usable", lambda *tensors: False)
    monkeypatch.setattr(attend, "attention_for", lambda pool: packed)
    mine, _ = in_pieces(heads, GATES, text, cuts)
    torch.testing.assert_close(real(mine, text), real(theirs, text), atol=1e-12, rtol=0)


def test_what_serves_which_device(monkeypatch):
    class Pool:
        def __init__(self, device, dtype, dim):
            self.device, self.dtype, self.shape = torch.device(device), dtype, (1, PAGE, dim)

    assert attention_for(Pool("cpu", torch.float32, 64)) is plain.attend
    assert attention_for(Pool("mps", torch.float16, 64)) is plain.attend
    assert attention_for(Pool("cuda", torch.bfloat16, 64)) is packed
    assert attention_for(Pool("cuda", torch.float32, 64)) is flex
    assert attention_for(Pool("cuda", torch.float16, 36)) is flex
    monkeypatch.setattr(ragged, "varlen", lambda: None)
    assert attention_for(Pool("cuda", torch.bfloat16, 64)) is flex
