"""Finalists that are trained, losses that are kept, and losses that are no numbers."""

import math

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.budget import Budget
from nestling.errors import NestlingError
from nestling.search import Trial, candidates, describe, pick
from nestling.surgery import prune
from tests.models import random_ranking, tiny, token_batches

FOUR = 4


@pytest.fixture
def setting():
    model = tiny("llama")
    return model, random_ranking(model), candidates(Anatomy.of(model), Budget.parse("0.6x")), token_batches(1)


class Training:
    """A stand-in whose loss after training is the reverse of the order before it, and falls with tokens."""

    def __init__(self, order):
        self.rank = {describe(candidate.shape): place for place, candidate in enumerate(order)}
        self.calls = []

    def trial(self, tokens=100):
        return Trial(self.train, self.loss, tokens)

    def train(self, child, tokens):
        child.trained = tokens
        return child

    def loss(self, child):
        self.calls.append((child.name, child.trained))
        return 10.0 - self.rank[child.name] - child.trained / 1000


def named(model, ranking):
    def build(shape):
        child = prune(model, ranking, shape)
        child.name = describe(shape)
        return child

    return build


def test_the_better_half_is_trained_for_twice_as_long_until_one_is_left(setting):
    model, ranking, found, text = setting
    order = pick(model, ranking, found, text, FOUR)
    names = [describe(candidate.shape) for candidate in order]
    training = Training(order)
    picked = pick(model, ranking, found, text, FOUR, named(model, ranking), trial=training.trial())
    assert training.calls == [(name, 100) for name in names] + [(name, 200) for name in (names[3], names[2])]
    assert [describe(candidate.shape) for candidate in picked] == [names[3], names[2], names[1], names[0]]
    assert [candidate.trained_tokens for candidate in picked] == [200, 200, 100, 100]
    assert picked[0].trained_loss == pytest.approx(10 - 3 - 0.2)
    assert picked[0].loss == order[3].loss, "the loss before training is still told"


def noting(said):
    return lambda what, left: said.append(what)


def test_what_was_measured_is_not_measured_again(setting):
    model, ranking, found, text = setting
    order = pick(model, ranking, found, text, FOUR)
    kept: dict[str, float] = {}
    whole = pick(model, ranking, found, text, FOUR, named(model, ranking), losses=kept, trial=Training(order).trial())
    for stop in (1, len(kept) // 2, len(kept) - 1):
        part = dict(list(kept.items())[:stop])
        said: list[str] = []
        again = pick(
            model, ranking, found, text, FOUR, named(model, ranking), noting(said), part, Training(order).trial()
        )
        assert again == whole
        assert part == kept
        assert len(said) == len(kept) - stop


def test_a_loss_that_is_no_number_comes_last_and_none_wins_if_all_are(setting):
    model, ranking, found, text = setting
    order = pick(model, ranking, found, text, FOUR)
    spoiled = next(candidate.shape for candidate in order if len(candidate.shape) > 1)

    def build(shape, bad=lambda shape: shape == spoiled):
        child = prune(model, ranking, shape)
        if bad(shape):
            with torch.no_grad():
                child.get_output_embeddings().weight.fill_(math.nan)
        return child

    picked = pick(model, ranking, found, text, FOUR, build)
    assert picked[-1].shape == spoiled
    assert math.isnan(picked[-1].loss)
    assert all(math.isfinite(candidate.loss) for candidate in picked[:-1])
    with pytest.raises(NestlingError, match="every shape that was tried gives the loss nan: check that the model"):
        pick(model, ranking, found, text, FOUR, lambda shape: build(shape, lambda _: True))
