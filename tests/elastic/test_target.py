"""Budgets are met: by chances at every temperature, by sizes at the end, with gradients that stay on the budget."""

import re
from functools import partial

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.cost import cost_of_form
from nestling.elastic.bill import Bill
from nestling.elastic.harden import TOLERANCE, check, harden
from nestling.elastic.space import Space
from nestling.elastic.target import Target, project
from nestling.errors import TargetError
from nestling.shape import fit
from tests.elastic.toy import random_logits, sorted_parent, space_of

WIDE = {"hidden_size": 96, "intermediate_size": 200}


def setting(variant="llama", budget="0.5x", per_layer=None, latency=None, **overrides):
    model, ranking = sorted_parent(variant, **(overrides or WIDE))
    space = space_of(model, ranking, per_layer)
    return space, Target.of(budget, Bill(Anatomy.of(model), 64), latency).on(space)


@pytest.mark.parametrize("tau", [1.0, 0.2])
@pytest.mark.parametrize("budget", ["0.75x", "0.5x", "kv_bytes=0.6x,params=0.7x", "active_params=0.7x"])
def test_chances_lie_on_the_budget(budget, tau):
    space, target = setting("qwen3_moe" if "active" in budget else "llama", budget)
    for seed in range(2):
        found = project(space, target, random_logits(space, seed), tau)
        assert target(*space.expected(found.chances)).item() == pytest.approx(1, abs=1e-5)
        assert all(torch.allclose(value.sum(-1), torch.ones(1, dtype=value.dtype)) for value in found.chances.values())


def test_the_dual_variable_is_differentiated():
    """Against finite differences of the whole projection; and no step of the logits leaves the budget."""
    space, target = setting(per_layer=("intermediate_size",))
    logits = {field: value.requires_grad_() for field, value in random_logits(space, 0).items()}
    weights = random_logits(space, 1)

    def value() -> torch.Tensor:
        chances = project(space, target, logits, 0.7).chances
        return sum((weights[field] * chances[field]).sum() for field in chances)

    value().backward()
    for field in logits:
        with torch.no_grad():
            logits[field][0, 0] += 1e-4
            above = value()
            logits[field][0, 0] -= 2e-4
            below = value()
            logits[field][0, 0] += 1e-4
        assert logits[field].grad[0, 0].item() == pytest.approx(((above - below) / 2e-4).item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "nemotron_h"])
@pytest.mark.parametrize("budget", ["0.75x", "0.5x"])
def test_sizes_meet_the_budget_whatever_the_seed(variant, budget):
    space, target = setting(variant, budget, per_layer=("intermediate_size",), intermediate_size=120)
    for seed in range(3):
        sizes = harden(space, target, random_logits(space, seed))
        assert abs(target.of_sizes(space, sizes) - 1) <= TOLERANCE


def test_the_wish_of_the_router_decides_within_the_budget():
    space, target = setting(per_layer=())
    logits = {field: 0 * knob.sizes for field, knob in space.knobs.items()}
    logits["hidden_size"][0, 0] = 20
    wide = harden(space, target, logits)
    logits["hidden_size"] = -logits["hidden_size"]
    assert int(wide["hidden_size"]) == 96 > int(harden(space, target, logits)["hidden_size"])


def test_a_chain_is_nested():
    space, large = setting(budget="0.75x")
    small = Target.of("0.5x", large.bill)
    for seed in range(2):
        above = harden(space, large, random_logits(space, seed))
        below = harden(space, small, random_logits(space, seed + 10), at_most=above)
        assert all((below[field] <= above[field]).all() for field in below)
        free = harden(space, small, random_logits(space, seed + 10))
        assert abs(small.of_sizes(space, below) - 1) <= TOLERANCE >= abs(small.of_sizes(space, free) - 1)


def test_latency_is_met_as_measured_and_steered_to_by_a_law():
    """With times that no sum of what is read can equal."""
    anatomy = Anatomy.of(sorted_parent("llama", **WIDE)[0])

    def latency(form):
        return 1 + 0.3 * len(form.layers) + cost_of_form(anatomy, form).params ** 0.8 / 500

    space, target = setting(budget="latency=0.7x,params=0.9x", per_layer=(), latency=latency)
    for seed in range(2):
        sizes = harden(space, target, random_logits(space, seed))
        form = fit(anatomy, space.shape(sizes), space.kept(sizes))
        assert max(latency(form) / (0.7 * latency(fit(anatomy, {}))), target.of_sizes(space, sizes)) <= 1 + TOLERANCE
        assert abs(target.of_sizes(space, sizes) - 1) <= TOLERANCE
        chances = project(space, target, random_logits(space, seed), 1.0).chances
        assert target(*space.expected(chances)).item() == pytest.approx(1, abs=1e-5)
        assert target(*space.exactly(sizes)).item() == pytest.approx(1, abs=0.1)
    with pytest.raises(TargetError, match="needs times measured"):
        setting(budget="latency=0.7x")


@pytest.mark.parametrize("budget", ["0.02x", "kv_bytes=0.01x,params=0.9x", "memory_bytes=300"])
def test_impossible_budgets_are_refused_with_one_that_is_not(budget):
    space, target = setting(budget=budget)
    with pytest.raises(TargetError, match="the smallest sizes on offer come to") as refusal:
        check(space, target)
    least = str(refusal.value).partition("come to ")[2].partition(", ask for")[0]
    again = Target.of(least, target.bill).on(space)
    check(space, again)
    assert abs(again.of_sizes(space, harden(space, again, random_logits(space, 0))) - 1) <= TOLERANCE


def test_a_budget_between_sizes_is_refused_with_the_nearest_that_is_met():
    """Experts alone of a tiny mixture, of which three at least stay."""
    model, _ = sorted_parent("qwen3_moe", num_experts=8, num_experts_per_tok=3)
    space = Space(Anatomy.of(model), range(4), axes=("num_experts",))
    bill = Bill(Anatomy.of(model), 64)
    even = {field: 0 * knob.sizes for field, knob in space.knobs.items()}
    found = set()
    for budget in ("0.5x", "0.7x", "0.975x"):
        target = Target.of(budget, bill).on(space)
        refuses = check if budget == "0.5x" else partial(harden, logits=even)
        with pytest.raises(TargetError, match=r"or allow more axes") as refusal:
            refuses(space, target)
        found.add(re.search(r"[0-9.]+x(?=, ask)", str(refusal.value))[0])
    assert len(found) > 1
    for budget in found:
        target = Target.of(budget, bill).on(space)
        assert abs(target.of_sizes(space, harden(space, target, even)) - 1) <= TOLERANCE


def test_budgets_that_leave_nothing_to_do_are_refused():
    _, target = setting()
    with pytest.raises(TargetError, match="not below the parent"):
        Target.of("1.5x", target.bill)
    with pytest.raises(TargetError, match="has no state to limit"):
        Target.of("state_bytes=0.5x", target.bill)
