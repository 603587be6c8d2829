"""The space of shapes: parents whose layers differ, layers that differ in cost, evolution."""

import dataclasses
import itertools
import math

import pytest
import torch
from transformers import AutoConfig

from nestling.anatomy import Anatomy
from nestling.budget import Budget
from nestling.cost import cost
from nestling.errors import TargetError
from nestling.ranking import Ranking
from nestling.search import Pricing, Space, candidates, evolve, pick, reachable, shapes
from nestling.search.space import grid
from nestling.shape import Shape
from nestling.surgery import prune
from tests.models import logits, random_ranking, tiny, token_batches

UNEVEN = {"intermediate_size": [44, 30, 20, 12], "num_attention_heads": [6, 4, 2, 4]}


def uneven():
    model = tiny("llama")
    return prune(model, random_ranking(model), UNEVEN)


def test_a_parent_whose_layers_differ_is_searched_and_cut():
    model = uneven()
    anatomy, ranking = Anatomy.of(model), random_ranking(model, seed=3)
    pricing, budget = Pricing(anatomy, ranking=ranking), Budget.parse("0.7x")
    picked = pick(model, ranking, reachable(pricing, budget), token_batches(1), finalists=3)
    whole = cost(model)
    for candidate in picked:
        child = prune(model, ranking, candidate.shape)
        assert child.num_parameters() == candidate.cost.params <= 0.7 * whole.params
        assert logits(child, token_batches(1)[0]["input_ids"]).isfinite().all()


def test_a_size_means_at_most_so_much_in_each_layer():
    pricing = Pricing(Anatomy.of(uneven()))
    assert pricing.capped({"intermediate_size": 24}) == Shape(intermediate_size=(24, 24, 20, 12))
    assert pricing.capped({"intermediate_size": 12}) == Shape(intermediate_size=12)
    assert pricing.capped({"intermediate_size": 44, "num_hidden_layers": 4}) == Shape()
    assert pricing.capped({"intermediate_size": 24, "num_hidden_layers": 2}) == Shape(
        intermediate_size=24, num_hidden_layers=2
    )
    ranking = Ranking({"num_hidden_layers": torch.tensor([0.0, 3.0, 2.0, 1.0])})
    by_rank = Pricing(Anatomy.of(uneven()), ranking=ranking)
    assert by_rank.capped({"intermediate_size": 24, "num_hidden_layers": 2})["intermediate_size"] == (24, 20)


def test_costs_are_those_of_the_layers_that_stay():
    """In an uneven model it matters which layers a shape keeps; the ranking says which."""
    model = uneven()
    anatomy = Anatomy.of(model)
    for scores in itertools.permutations([0.0, 1.0, 2.0, 3.0]):
        ranking = random_ranking(model)
        ranking = dataclasses.replace(ranking, scores={**ranking.scores, "num_hidden_layers": torch.tensor(scores)})
        priced = Pricing(anatomy, ranking=ranking).cost({"num_hidden_layers": 2})
        assert priced.params == prune(model, ranking, {"num_hidden_layers": 2}).num_parameters()


@pytest.mark.parametrize("seed", [0, 1])
def test_evolution_finds_what_going_through_all_finds(seed):
    space = Space(Pricing(Anatomy.of(tiny("llama-mha"))), Budget.parse("0.5x"), floor=0.25)
    full = {"hidden_size": 48, "intermediate_size": 44, "num_key_value_heads": 6, "num_attention_heads": 6}
    weights = {"hidden_size": 3.0, "intermediate_size": 1.0, "num_key_value_heads": 0.5, "num_hidden_layers": 0.7}

    def damage(shape):
        return sum(weights.get(name, 0.1) * (1 - size / full.get(name, 4)) ** 2 for name, size in shape.items())

    every = [priced for sizes in space.combinations() if (priced := space.largest(sizes))]
    best = min(damage(shape) for shape, _ in every)
    found = evolve(space, damage, seed, population=48, generations=25)
    assert damage(found[0][0]) == pytest.approx(best)
    assert [damage(shape) for shape, _ in found] == sorted(damage(shape) for shape, _ in found)
    assert len(every) > 100
    again = evolve(space, damage, seed, population=48, generations=25)
    assert found == again, "the same seed gives the same result"


def test_a_space_too_large_to_go_through_is_evolved(monkeypatch):
    space = Space(Pricing(Anatomy.of(tiny("llama"))), Budget.parse("0.6x"))
    every = dict(shapes(space))
    monkeypatch.setattr("nestling.search.space.ENUMERABLE", 3)
    asked = []
    few = shapes(space, lambda shape: asked.append(shape) or float(len(shape)), seed=0)
    assert asked
    assert set(dict(few)) <= set(every)
    with pytest.raises(TargetError, match="no shape of this model keeps"):
        candidates(Anatomy.of(tiny("llama")), Budget.parse("0.001x"))


def test_every_limit_is_kept():
    model = tiny("llama")
    budget = Budget.parse("params=0.9x,active_params=0.8x,memory_bytes=0.6x,kv_bytes=0.7x,flops_per_token=0.7x")
    pricing = Pricing(Anatomy.of(model), context=64, batch=3)
    whole = pricing.cost({})
    found = shapes(reachable(pricing, budget))
    for shape, price in found:
        assert price == cost(model, shape, context=64, batch=3)
        assert budget.met_by(price, whole)
        assert budget.used_by(price, whole) > 0.9
    assert not all(Budget.parse("params=0.6x").met_by(price, whole) for _, price in found)


def test_shapes_that_leave_much_of_the_budget_give_way_to_those_that_use_it():
    space = reachable(Pricing(Anatomy.of(tiny("llama"))), Budget.parse("0.8x"))
    used = [space.budget.used_by(price, space.parent) for _, price in shapes(space)]
    every = [
        space.budget.used_by(priced[1], space.parent) for s in space.combinations() if (priced := space.largest(s))
    ]
    assert min(used) >= 0.9 > min(every)


def test_the_grid_has_sizes_that_hardware_likes():
    config = AutoConfig.for_model(
        "llama", hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=64
    )
    config.num_hidden_layers = 1
    anatomy = Anatomy.of(config)
    hidden, ffn = (grid(anatomy, anatomy.axis(name), 0.5) for name in ("hidden_size", "intermediate_size"))
    assert hidden[0] == 2048 and ffn[0] == 5632  # noqa: PT018
    assert all(size % 256 == 0 for size in hidden + ffn)
    heads = grid(anatomy, anatomy.axis("num_attention_heads"), 0.5)
    assert heads == [32, 28, 24, 20, 16], "the same number in every group"
    assert math.gcd(*hidden) >= 256
