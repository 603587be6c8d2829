"""Delayed eviction: all ways of attention against a loop that finds for each query which tokens are left."""

import pytest
import torch

from nestling.dmc.runtime import attend, drop
from nestling.dmc.runtime.attend import parallel
from nestling.dmc.runtime.gates import Gates
from nestling.dmc.runtime.heads import Text
from nestling.dmc.runtime.slots import PAGE, SlotLayer
from tests.dmc.reference import _attend, all_text, cut, random_heads
from tests.dmc.test_attend import HEADS, in_pieces, real

CUTS = ([0, 17], [0, 1, 17], [0, 6, 7, 8, 17], [0, 5, 10, 15, 17], list(range(18)))


def dms(window, **changes):
    return Gates(**({"scale": 2.0, "offset": 0.3, "keep": 0.0, "method": "dms", "window": window} | changes))


def drop_slowly(heads, gates, text, early=0):
    """Outputs and how many tokens each head holds at the end; `early` queries too soon is a mistake, for controls."""
    batch, count, group = heads.query.shape[:3]
    out, lengths = torch.zeros_like(heads.query), [[0] * count for _ in range(batch)]
    for b in range(batch):
        tokens = text.valid[b].nonzero().flatten().tolist()
        for h in range(count):
            for at, t in enumerate(tokens):
                left = []
                for j, token in enumerate(tokens[: at + 1]):
                    channel = heads.key[b, :, :, -1].mean(0) if gates.shared else heads.key[b, h, :, -1]
                    doomed = j < at and bool(gates.scale * channel[tokens[j + 1]] > gates.offset)
                    if not doomed or at - j <= gates.window - early:
                        left.append([(1.0, heads.key[b, h, token], heads.value[b, h, token], token)])
                lengths[b][h] = len(left)
                for g in range(group):
                    out[b, h, g, t] = _attend(heads, b, h, g, t, left, gates, early=False)
    return out, lengths


def slots_for(heads, gates):
    slots = SlotLayer()
    slots.lazy_initialization(heads.key, heads.value, gates.recent)
    return slots


@pytest.mark.parametrize("window", [0, 1, 4, 30])
@pytest.mark.parametrize("shape", HEADS)
def test_all_ways_agree_with_a_loop_over_tokens(shape, window):
    heads, gates = random_heads(2, *HEADS[shape], seq=17), dms(window, shared=shape == "mha")
    text = all_text(heads, pads=(0, 4), ends=[(0, 7)])
    expected, lengths = drop_slowly(heads, gates, text)
    out, decisions = parallel(heads, gates, text)
    torch.testing.assert_close(real(out, text), real(expected, text), atol=1e-12, rtol=0)
    assert (~decisions.quiet & text.valid[:, None]).sum(-1).tolist() == lengths
    for cuts in CUTS:
        out, slots = in_pieces(heads, gates, text, cuts, slots_for(heads, gates))
        torch.testing.assert_close(real(out, text), real(expected, text), atol=1e-12, rtol=0)
        assert slots.length.tolist() == lengths
        assert slots.get_seq_length() == 17


def test_dropping_a_token_too_early_is_another_function():
    heads, gates = random_heads(seq=17), dms(4)
    text = all_text(heads)
    wrong, _ = drop_slowly(heads, gates, text, early=1)
    assert (parallel(heads, gates, text)[0] - wrong).abs().max() > 1e-2


def test_what_is_cached_does_not_depend_on_the_split():
    heads, gates, seq = random_heads(seq=3 * PAGE + 5, dim=4), dms(6), 3 * PAGE + 5
    text = all_text(heads)
    _, whole = in_pieces(heads, gates, text, [0, seq], slots_for(heads, gates))
    _, parts = in_pieces(heads, gates, text, [0, 40, 41, 42, 43, seq - 1, seq], slots_for(heads, gates))
    assert whole.length.tolist() == parts.length.tolist()
    assert whole.length.max() < seq
    for row in range(2):
        for head in range(2):
            mine, theirs = (
                torch.cat(s.read(row, head, int(s.length[row, head])), -1) for s in (whole, parts)
            )  # the same rows in some order
            assert torch.cdist(mine, theirs).min(1).values.max() < 1e-6


def test_long_text_without_a_cache_is_scored_as_it_would_be_decoded(monkeypatch):
    heads, gates = random_heads(seq=30), dms(3)
    text = all_text(heads)
    square, decided = parallel(heads, gates, text)
    monkeypatch.setattr(attend, "DENSE", 8)
    monkeypatch.setattr(drop, "QUERIES", 7)
    long, same = attend.attention(heads, gates, text, None, training=False)
    torch.testing.assert_close(long, square, atol=1e-12, rtol=0)
    assert torch.equal(decided.quiet, same.quiet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_loops_against_whole_tensors(dtype, monkeypatch):
    heads, gates = random_heads(2, 2, 3, seq=PAGE + 9, dim=8), dms(2)
    heads = type(heads)(*(s.to(dtype) for s in (heads.query, heads.key, heads.value)), heads.rotate, heads.scaling)
    text, cuts = all_text(heads, pads=(0, 2)), list(range(PAGE + 10))
    mine, slots = in_pieces(heads, gates, text, cuts, slots_for(heads, gates))
    monkeypatch.setattr(attend, "usable", lambda *tensors: False)
    theirs, others = in_pieces(heads, gates, text, cuts, slots_for(heads, gates))
    close = {"atol": 32 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(real(mine, text), real(theirs, text), **close)
    for name in ("length", "recent", "seen"):
        assert torch.equal(getattr(slots, name), getattr(others, name)), name


def test_a_window_over_all_of_the_text_is_plain_attention():
    heads = random_heads()
    text = all_text(heads)
    out, decisions = parallel(heads, dms(20), text, training=True)
    open_gates = Gates(scale=2.0, offset=1e9, keep=0.0)
    torch.testing.assert_close(out, parallel(heads, open_gates, text)[0], atol=1e-12, rtol=0)
    assert not decisions.quiet.any()


def test_relaxed_decisions_and_their_gradient():
    heads, gates = random_heads(1, 1, 1, seq=9), dms(2)
    heads.key.requires_grad_()
    torch.manual_seed(5)
    out, decisions = parallel(heads, gates, all_text(heads), training=True)
    torch.manual_seed(5)
    alpha = torch.sigmoid(attend.relaxed(decisions.logits, gates)[0, 0])
    query, keys = heads.rotated(heads.key, 0.0)
    scores = query[0, 0, 0] @ keys[0, 0].T * heads.scaling
    gone = torch.tensor([[j < 8 and i - j > 2 for j in range(9)] for i in range(9)])
    scores = scores + torch.where(gone, torch.log1p(-torch.roll(alpha, -1)), 0)
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(out[0, 0, 0], scores.softmax(-1) @ heads.value[0, 0], atol=1e-10, rtol=0)
    (decisions.merged.sum() + out.square().sum()).backward()
    gradient = heads.key.grad[0, 0, :, -1]
    assert gradient[1:7].abs().min() > 0
    assert gradient[7:].abs().max() == 0  # nothing is dropped by those within this text


@pytest.mark.parametrize("training", [False, True])
def test_no_output_depends_on_later_tokens(training):
    heads, gates, outputs = random_heads(), dms(0), []
    for change in (-3.0, 3.0):
        changed = cut(heads, 0, 20)
        changed.key[..., 12:, :] = change
        torch.manual_seed(0)
        outputs.append(parallel(changed, gates, all_text(heads), training)[0][..., :12, :].clone())
    torch.testing.assert_close(*outputs, atol=0, rtol=0)


def test_memory_follows_what_is_dropped():
    heads, gates = random_heads(1, 2, 1, seq=400, dim=4, dtype=torch.float32), dms(8, offset=-1.5)
    _, slots = in_pieces(heads, gates, Text(*(torch.zeros(1, 400).bool(),) * 2), [0, 400], slots_for(heads, gates))
    assert slots.length.tolist() == [[0, 0]]  # only padding
    _, slots = in_pieces(heads, gates, all_text(heads), [0, 400], slots_for(heads, gates))
    assert slots.length.max() < 150
    assert slots.nbytes < 0.6 * 2 * heads.key.numel() * 4
