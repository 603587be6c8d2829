"""The eviction that benchmarks hold against a compressed cache, against lists of what each head holds."""

import math

import pytest
import torch
from benchmarks.dmc import baselines
from benchmarks.dmc.baselines import POLICIES, SINKS, evicting, pooled, rotations, stream

from tests.dmc.reference import rotate_one
from tests.models import logits, tiny, token_batches

BATCH, HEADS, GROUP, SEQ, DIM = 2, 2, 3, 16, 6
WINDOW, FUTURE = 3, 5


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(baselines, "WINDOW", WINDOW)
    monkeypatch.setattr(baselines, "FUTURE", FUTURE)


def turn(position):
    """The rotation to a position, for row vectors."""
    return torch.stack([rotate_one(axis, position) for axis in torch.eye(DIM, dtype=torch.float64)])


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, HEADS * GROUP, SEQ, DIM, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(BATCH, HEADS, SEQ, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return query, key, value


def slowly(query, key, value, name, budget):
    """Token by token with lists; heads of a layer are looked at together, since TOVA decides for all of them."""
    out = torch.zeros(BATCH, SEQ, HEADS * GROUP, DIM, dtype=torch.float64)
    for b in range(BATCH):
        history = []
        held = [[] for _ in range(HEADS)]
        attention = [{} for _ in range(HEADS)]  # of a token, from all queries so far
        for t in range(SEQ):
            latest = [{} for _ in range(HEADS)]
            for h in range(HEADS):
                held[h].append(t)
                for g in range(GROUP):
                    scores = [query[b, h * GROUP + g, t] @ key[b, h, j] / math.sqrt(DIM) for j in held[h]]
                    total = sum(math.exp(score) for score in scores)
                    for j, score in zip(held[h], scores, strict=True):
                        weight = math.exp(score) / total
                        out[b, t, h * GROUP + g] += weight * value[b, h, j]
                        latest[h][j] = latest[h].get(j, 0) + weight
                        attention[h][j] = attention[h].get(j, 0) + weight
            history.append(latest)
            for h in range(HEADS):
                if len(held[h]) > budget:
                    states = query[b, h * GROUP : (h + 1) * GROUP], key[b, h], value[b, h]
                    held[h].remove(given_up(name, h, held[h], attention, history, budget, states))
    return out


def given_up(name, head, held, attention, history, budget, states):
    older, latest = held[:-1], history[-1]
    if name == "keydiff":
        directions = {j: states[1][j] / states[1][j].norm() for j in held}
        anchor = sum(directions.values())
        return max(older, key=lambda j: directions[j] @ anchor)
    if name == "snapkv":
        seen = [sum(weights[head].get(j, 0) for weights in history[-WINDOW:]) for j in range(held[-1] + 1)]
        return min((j for j in held if j <= held[-1] - WINDOW), key=lambda j: sum(seen[max(0, j - 2) : j + 3]))
    if name == "expected":
        worth = expectation(states, held)
        return min((j for j in older if j >= SINKS), key=worth.get)
    if name == "streaming":
        return next(j for j in held if j >= 4)
    if name == "tova":
        return min(older, key=lambda j: sum(weights.get(j, 0) for weights in latest))
    t = held[-1]
    heavy = [j for j in older if j <= t - budget // 2]
    return min(heavy, key=lambda j: attention[head][j])


def expectation(states, held):
    """exp(mu k + k Sigma k / 2) for queries of the next positions, normed, times the value's norm, token by token."""
    (query, key, value), t = states, held[-1]
    ahead = sum(turn(t + 1 + i) for i in range(FUTURE)) / FUTURE
    found = {}
    for of_head in query:
        plain = torch.stack([of_head[i] @ turn(i).inverse() for i in range(SINKS, t + 1)])
        mean, spread = plain.mean(0) @ ahead, ahead.T @ torch.cov(plain.T, correction=0) @ ahead
        raw = {j: math.exp(mean @ key[j] / DIM**0.5 + key[j] @ spread @ key[j] / (2 * DIM)) for j in held}
        for j in held:
            found[j] = found.get(j, 0) + raw[j] / sum(raw.values()) * float(value[j].norm())
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_against_lists(name):
    query, key, value = states()
    turns = torch.stack([turn(i) for i in range(SEQ + FUTURE)])
    found = stream(query, key, value, 1 / math.sqrt(DIM), POLICIES[name], 8, turns)
    torch.testing.assert_close(found, slowly(query, key, value, name, 8), atol=1e-12, rtol=0)
    other = "tova" if name != "tova" else "h2o"
    assert (found - slowly(query, key, value, other, 8)).abs().max() > 1e-3


def test_rotations_are_those_of_the_model():
    theta = {"rope_type": "default", "rope_theta": 50.0}
    model = tiny("llama", dtype=torch.float32, head_dim=DIM, rope_parameters=theta)
    expected = torch.stack([turn(i) for i in range(7)]).float()
    torch.testing.assert_close(rotations(model, 7), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["h2o", "streaming", "expected"])
def test_a_model_evicts_within_the_context_only(name):
    model, ids = tiny("llama"), token_batches(1, seq=14)[0]["input_ids"]
    plain = logits(model, ids)
    with evicting(model, name, 14):
        torch.testing.assert_close(logits(model, ids), plain, atol=1e-10, rtol=0)
    with evicting(model, name, 6):
        few = logits(model, ids)
    torch.testing.assert_close(few[:, :6], plain[:, :6], atol=1e-10, rtol=0)
    assert (few[:, 7:] - plain[:, 7:]).abs().max() > 1e-3
    torch.testing.assert_close(logits(model, ids), plain, atol=0, rtol=0)


def test_pooled_heads_that_were_the_same_change_nothing():
    model, ids = tiny("llama", dtype=torch.float32, head_dim=8), token_batches(1)[0]["input_ids"]
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.copy_(projection.weight[:8].repeat(2, 1))
    small = pooled(model, 1)
    assert small.config.num_key_value_heads == 1
    torch.testing.assert_close(logits(small, ids), logits(model, ids), atol=1e-5, rtol=0)
