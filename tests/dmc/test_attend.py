"""Three ways of attention are one function: each against a loop over tokens, for any split of the text."""

import copy
from itertools import pairwise

import pytest
import torch

from nestling.dmc.runtime import attend, kernel, team
from nestling.dmc.runtime.attend import decode, parallel, prefill
from nestling.dmc.runtime.gates import Gates
from nestling.dmc.runtime.heads import Heads, Text
from nestling.dmc.runtime.plain import step as plain_step
from nestling.dmc.runtime.slots import PAGE, SlotLayer
from tests.dmc.reference import all_text, angles, cut, decode_slowly, random_heads, rotation

GATES = Gates(scale=2.0, offset=0.5, keep=0.0)
HEADS = {"mha": (3, 1), "gqa": (2, 2), "mqa": (1, 3)}


def in_pieces(heads, gates, text, cuts, slots=None):
    """Run the text piece by piece on one cache; pieces of one token are decoded."""
    slots = slots or SlotLayer()
    outputs = []
    for start, stop in pairwise(cuts):
        part = cut(heads, start, stop)
        now = Text(text.valid[:, start:stop], text.ends[:, start:stop])
        if not slots.is_initialized:
            slots.lazy_initialization(part.key, part.value)
        outputs.append(decode(part, gates, now, slots) if stop - start == 1 else prefill(part, gates, now, slots)[0])
    return torch.cat(outputs, -2), slots


def real(out, text):
    return out.movedim(-2, 1)[text.valid]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", HEADS)
def test_all_ways_agree_with_a_loop_over_tokens(shape, shared):
    heads = random_heads(2, *HEADS[shape], seq=17)
    gates = Gates(scale=2.0, offset=0.5, keep=0.0, shared=shared)
    text = all_text(heads, pads=(0, 4), ends=[(0, 7), (1, 12)])
    expected, lengths = decode_slowly(heads, gates, text)
    out, decisions = parallel(heads, gates, text)
    torch.testing.assert_close(real(out, text), real(expected, text), atol=1e-12, rtol=0)
    appended = (~decisions.quiet & text.valid[:, None]).sum(-1)
    assert appended.tolist() == lengths
    for cuts in ([0, 17], [0, 1, 17], [0, 6, 7, 8, 17], [0, 5, 10, 15, 17], list(range(18))):
        out, slots = in_pieces(heads, gates, text, cuts)
        torch.testing.assert_close(real(out, text), real(expected, text), atol=1e-12, rtol=0)
        assert slots.length.tolist() == lengths
        assert slots.get_seq_length() == 17


def test_a_mean_of_rotated_keys_is_another_function():
    heads = random_heads()
    text = all_text(heads)
    wrong, _ = decode_slowly(heads, GATES, text, rotate_before_mean=True)
    assert (parallel(heads, GATES, text)[0] - wrong).abs().max() > 1e-2


def test_what_is_cached_does_not_depend_on_the_split():
    heads = random_heads(seq=3 * PAGE + 5, dim=4)
    text = all_text(heads)
    _, whole = in_pieces(heads, GATES, text, [0, 3 * PAGE + 5])
    _, parts = in_pieces(heads, GATES, text, [0, 40, 41, 42, 43, 3 * PAGE + 5])
    for row in range(2):
        for head in range(2):
            count = int(whole.length[row, head])
            for mine, theirs in zip(whole.read(row, head, count), parts.read(row, head, count), strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    torch.testing.assert_close(whole.sums, parts.sums, atol=1e-12, rtol=0)


def test_long_text_without_a_cache_is_scored_as_it_would_be_decoded(monkeypatch):
    heads = random_heads(seq=30)
    text = all_text(heads)
    square, _ = parallel(heads, GATES, text)
    monkeypatch.setattr(attend, "DENSE", 8)
    monkeypatch.setattr(attend, "QUERIES", 7)
    long, _ = attend.attention(heads, GATES, text, None, training=False)
    torch.testing.assert_close(long, square, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("offset", "slots"), [(1e9, 20), (-1e9, 1)])
def test_nothing_merged_is_plain_attention_and_all_merged_is_one_slot(offset, slots):
    heads = random_heads()
    gates, text = Gates(scale=2.0, offset=offset, keep=0.0), all_text(heads)
    out, layer = in_pieces(heads, gates, text, [0, 20])
    assert layer.length.tolist() == [[slots, slots]] * 2
    if slots == 20:
        query, keys = heads.rotated(heads.key, 0.0)
        scores = (query @ keys.unsqueeze(2).mT) * heads.scaling
        later = torch.ones(20, 20, dtype=torch.bool).triu(1)
        plain = scores.masked_fill(later, -torch.inf).softmax(-1) @ heads.value.unsqueeze(2)
        torch.testing.assert_close(out, plain, atol=1e-12, rtol=0)
    else:  # a softmax over one slot gives the mean so far, whatever the scores
        weight = torch.sigmoid(gates.scale * heads.query[..., -1].mean(2) + offset) + 2.0**-23
        mean = (weight.unsqueeze(-1) * heads.value).cumsum(-2) / weight.cumsum(-1).unsqueeze(-1)
        torch.testing.assert_close(out, mean.unsqueeze(2).expand_as(out), atol=1e-9, rtol=0)


def test_relaxed_decisions_against_their_definition():
    """K_t = sum_j c_tj k_j / sum_j c_tj with c_tj = omega_j prod alpha, and log(1 - alpha) of the next token."""
    heads = random_heads(1, 1, 1, seq=9)
    text = all_text(heads)
    torch.manual_seed(5)
    out, decisions = parallel(heads, GATES, text, training=True)
    torch.manual_seed(5)
    noisy = attend.relaxed(decisions.logits, GATES)[0, 0]
    alpha = torch.sigmoid(noisy)
    alpha[0] = 0
    weight = torch.sigmoid(GATES.scale * heads.query[0, 0, 0, :, -1] + GATES.offset) + 2.0**-23
    share = torch.stack([torch.stack([weight[j] * alpha[j + 1 : t + 1].prod() for j in range(9)]) for t in range(9)])
    share = share.tril() / share.tril().sum(1, keepdim=True)
    query, keys = heads.rotated((share @ heads.key[0, 0])[None, None], 0.0)
    scores = query[0, 0, 0] @ keys[0, 0].T * heads.scaling
    for i in range(9):
        for j in range(i):
            scores[i, j] += torch.log1p(-alpha[j + 1])
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1) @ (share @ heads.value[0, 0])
    torch.testing.assert_close(out[0, 0, 0], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_no_output_depends_on_later_tokens(training):
    heads = random_heads()
    text = all_text(heads)
    outputs = []
    for change in (0.0, 3.0):
        changed = cut(heads, 0, 20)
        for states in (changed.query, changed.key, changed.value):
            states[..., 12:, :] = heads.value[..., 12:, :].unsqueeze(2) * 0 + change if states.dim() == 5 else change
        torch.manual_seed(0)
        outputs.append(parallel(changed, GATES, text, training)[0][..., :12, :].clone())
    torch.testing.assert_close(*outputs, atol=0, rtol=0)


def test_without_the_exempt_diagonal_the_next_token_would_leak(monkeypatch):
    heads = random_heads()
    monkeypatch.setattr(Gates, "spared", -1)
    outputs = []
    for change in (-3.0, 3.0):
        heads.key[..., 12, -1] = change
        torch.manual_seed(0)
        outputs.append(parallel(heads, GATES, all_text(heads), training=True)[0][..., :12, :].clone())
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_gradients_reach_what_makes_decisions_and_weights():
    heads = random_heads(seq=12)
    for states in (heads.query, heads.key, heads.value):
        states.requires_grad_()
    out, decisions = parallel(heads, GATES, all_text(heads), training=True)
    (out.square().sum() + decisions.merged.sum()).backward()
    for states in (heads.query, heads.key, heads.value):
        assert torch.isfinite(states.grad).all()
    assert heads.key.grad[..., -1].abs().max() > 0
    assert heads.query.grad[..., -1].abs().max() > 0


def test_the_same_weight_for_all_is_a_mean_and_its_size_does_not_matter():
    heads = random_heads()
    text = all_text(heads)
    heads.query[..., -1] = 0.3
    once = parallel(heads, GATES, text)[0]
    heads.query[..., -1] = 0.9
    torch.testing.assert_close(parallel(heads, GATES, text)[0], once, atol=1e-12, rtol=0)


def test_float32_sums_of_a_long_slot():
    heads = random_heads(1, 1, 1, seq=3000, dim=4, dtype=torch.float32)
    gates = Gates(scale=1.0, offset=-1e9, keep=0.0)
    sums = attend.running_sums(torch.ones(1, 1, 3000), attend._terms(heads, torch.full((1, 1, 3000), 0.993)))
    exact = heads.key[0, 0].double().mean(0)
    torch.testing.assert_close((sums[0, 0, -1, :4] / sums[0, 0, -1, -1]).double(), exact, atol=1e-5, rtol=0)
    assert gates.active


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_loops_against_whole_tensors(dtype, monkeypatch):
    heads = random_heads(2, 2, 3, seq=PAGE + 3, dim=8)
    heads = type(heads)(*(s.to(dtype) for s in (heads.query, heads.key, heads.value)), heads.rotate, heads.scaling)
    text, cuts = all_text(heads, pads=(0, 2)), list(range(PAGE + 4))
    mine, slots = in_pieces(heads, GATES, text, cuts)
    monkeypatch.setattr(attend, "usable", lambda *tensors: False)
    theirs, others = in_pieces(heads, GATES, text, cuts)
    close = {"atol": 4 * torch.finfo(dtype).eps, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(real(mine, text), real(theirs, text), **close)
    assert slots.length.tolist() == others.length.tolist()
    torch.testing.assert_close(slots.sums, others.sums, atol=1e-5, rtol=0)


def filled(lengths, dim, dtype=torch.float32):
    slots = SlotLayer()
    like = torch.zeros(*lengths.shape, 0, dim, dtype=dtype)
    slots.lazy_initialization(like, like)
    slots.reserve(lengths)
    slots.length = lengths
    slots.keys, slots.values = torch.randn_like(slots.keys), torch.randn_like(slots.values)
    slots.sums = torch.rand_like(slots.sums)
    return slots


def both(slots, group, present, seed=0):
    """What the loops and what whole tensors make of one token more, the latter in the precision of softmax; what is
    held must agree as well. present: sequences that have the token."""
    (batch, count), dim, wide = (
        slots.length.shape,
        slots.keys.shape[-1],
        torch.promote_types(slots.dtype, torch.float32),
    )
    heads = random_heads(batch, count, group, 1, dim, seed, slots.dtype)
    turn, text = angles(2, 1, dim, slots.dtype), Text(present.unsqueeze(1), torch.zeros(batch, 1, dtype=torch.bool))
    other = copy.deepcopy(slots)
    other.keys, other.values = slots.keys.to(wide), slots.values.to(wide)
    states = heads.query, heads.key, heads.value
    mine = kernel.step(Heads(*states, rotation(2, 1), 0.4, turn), GATES, text, slots)
    theirs = plain_step(Heads(*(s.to(wide) for s in states), rotation(2, 1), 0.4), GATES, text, other)
    assert slots.length.tolist() == other.length.tolist()
    for b in range(batch):
        for h in range(count):
            for pool, exact in zip(*(s.read(b, h, int(s.length[b, h])) for s in (slots, other)), strict=True):
                torch.testing.assert_close(
                    pool, exact.to(slots.dtype), atol=16 * eps(slots.dtype), rtol=eps(slots.dtype)
                )
    return mine, theirs


def eps(dtype):
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", kernel.DTYPES)
@pytest.mark.parametrize("dim", [32, 80, 256])
def test_sizes_of_heads_and_dtypes(dim, dtype):
    slots = filled(torch.tensor([[4 * PAGE, 5], [9 * PAGE + 3, 1]]), dim, dtype)
    slots.keys[0, :2] *= 1e-5  # numbers that half precision keeps with fewer bits
    slots.sums[0, 1] *= 1e-6
    slots.sums[0, 1, -1] = 1.0
    mine, theirs = both(slots, 2, torch.ones(2, dtype=torch.bool))
    assert torch.isfinite(mine).all()
    torch.testing.assert_close(mine, theirs, atol=32 * eps(dtype), rtol=4 * eps(dtype))


@pytest.mark.parametrize("pool", ["team", "python"])
@pytest.mark.parametrize("threads", [1, 3])
def test_heads_of_any_length_and_any_number_of_threads(threads, pool, monkeypatch):
    monkeypatch.setattr(kernel, "THREADED_NUMBERS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if pool == "python":
        monkeypatch.setattr(team, "_team", lambda: None)
    before, alone = filled(torch.tensor([[1, PAGE], [PAGE + 1, 1300], [512, 513], [0, 0]]), 8), None
    for _ in range(20):
        mine, theirs = both(copy.deepcopy(before), 3, torch.tensor([True, True, True, False]))
        torch.testing.assert_close(mine[:3], theirs[:3], atol=1e-6, rtol=1e-5)
        assert not mine[3].any()
        alone = mine if alone is None else alone
        torch.testing.assert_close(mine, alone, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_rounds_them(dtype):
    slots, borders = SlotLayer(), torch.tensor([0.0, 65519.0, 65520.0, -1e6, torch.inf, 2.0**-24, 1.5 * 2.0**-24, 3e-8])
    torch.manual_seed(0)
    numbers = torch.cat(
        [torch.randn(4000) * 10.0 ** torch.randint(-8, 5, (4000,)), 1 + torch.arange(64) / 2**12, borders]
    )
    value = numbers.view(1, 1, 1, -1)
    slots.lazy_initialization(value[:, :, :0].to(dtype), value[:, :, :0].to(dtype), recent=1)
    heads = Heads(value[:, :, None] * 0, value * 0, value, rotation(0, 1), 1.0, (torch.empty(1, 1, 0),) * 2)
    kernel.step(heads, Gates(keep=0.0, method="dms", window=0), all_text(heads), slots)
    assert torch.equal(slots.values[0, 0], numbers.to(dtype))


def test_padding_changes_nothing():
    slots = filled(torch.tensor([[3, 40], [3, 40]]), 8)
    before = copy.deepcopy(slots)
    both(slots, 1, torch.tensor([True, False]))
    assert (slots.keys != before.keys).any(-1).sum() == 2
    assert torch.equal(slots.sums[1], before.sums[1])
