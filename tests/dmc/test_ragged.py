"""Attention over pages by kernels for other devices, run on a CPU, against whole tensors that are padded."""

import pytest
import torch

from nestling.dmc.runtime import attend, ragged
from nestling.dmc.runtime.plain import PLAIN
from nestling.dmc.runtime.ragged import FLEX, PACKED, pages_of, step_for
from nestling.dmc.runtime.slots import PAGE
from tests.dmc.reference import all_text, random_heads
from tests.dmc.test_attend import GATES, filled, in_pieces, real

LENGTHS = torch.tensor([[1, PAGE, 5], [PAGE + 1, 3 * PAGE + 7, 2 * PAGE], [2, 1, 40]])
STEPS = {"flex": FLEX, "packed": PACKED}


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
@pytest.mark.parametrize("name", STEPS)
def test_heads_of_any_length(name):
    torch.manual_seed(0)
    slots = filled(LENGTHS, 8, torch.float64)
    query, present = torch.randn(3, 3, 2, 8, dtype=torch.float64), torch.tensor([True, True, False])
    top = torch.randn(3, 3, 8, dtype=torch.float64), torch.randn(3, 3, 8, dtype=torch.float64)
    before, pools = slots.keys.clone(), []
    found = []
    for step in (STEPS[name], PLAIN):
        slots.keys = before.clone()
        found.append(step.attend(query.clone(), top, present, slots, 0.0, 0.4))
        pools.append(slots.keys)
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)
    torch.testing.assert_close(*pools, atol=0, rtol=0)
    slots.table[1, 1, 0], slots.table[1, 2, 0] = slots.table[1, 2, 0].clone(), slots.table[1, 1, 0].clone()
    other = STEPS[name].attend(query.clone(), top, present, slots, 0.0, 0.4)
    changed = (other - found[0]).abs().amax((2, 3)) > 1e-6
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
    monkeypatch.setattr(attend, "step_for", lambda pool: PACKED)
    mine, _ = in_pieces(heads, GATES, text, cuts)
    torch.testing.assert_close(real(mine, text), real(theirs, text), atol=1e-12, rtol=0)


def test_what_serves_which_device(monkeypatch):
    class Pool:
        def __init__(self, device, dtype, dim):
            self.device, self.dtype, self.shape = torch.device(device), dtype, (1, PAGE, dim)

    assert step_for(Pool("cpu", torch.float32, 64)) is PLAIN
    assert step_for(Pool("mps", torch.float16, 64)) is PLAIN
    assert step_for(Pool("cuda", torch.bfloat16, 64)) is PACKED
    assert step_for(Pool("cuda", torch.float32, 64)) is FLEX
    assert step_for(Pool("cuda", torch.float16, 36)) is FLEX
    monkeypatch.setattr(ragged, "varlen", lambda: None)
    assert step_for(Pool("cuda", torch.bfloat16, 64)) is FLEX
