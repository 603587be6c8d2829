"""Budgets: every way to write one, and what is refused."""

import dataclasses

import pytest

from nestling.budget import Budget
from nestling.cost import Cost
from nestling.errors import TargetError

PARENT = Cost(1000, 1000, 4000, 800, 0, 2000, context=10, batch=1)

FORMS = {
    "0.5x": {"params": (0.5, True)},
    ".5X": {"params": (0.5, True)},
    0.5: {"params": (0.5, True)},
    "0.5": {"params": (0.5, True)},
    "params=.25,kv_bytes=0.75": {"params": (0.25, True), "kv_bytes": (0.75, True)},
    "1": {"params": (1, False)},
    "0.5k": {"params": (500, False)},
    "memory_bytes=8Gi": {"memory_bytes": (8 * 2**30, False)},
    "latency=20ms": {"latency": (20, False)},
    "latency=0.5s,params=0.9x": {"latency": (500, False), "params": (0.9, True)},
    "100M": {"params": (100e6, False)},
    "7B": {"params": (7e9, False)},
    "1.5k": {"params": (1500, False)},
    "2T": {"params": (2e12, False)},
    "1Ki": {"params": (1024, False)},
    "3GI": {"params": (3 * 2**30, False)},
    "12345": {"params": (12345, False)},
    12345: {"params": (12345, False)},
    "params=4B,kv_bytes=1G,latency=0.7x": {"params": (4e9, False), "kv_bytes": (1e9, False), "latency": (0.7, True)},
    " flops_per_token = 0.3x , 9 M": {"flops_per_token": (0.3, True), "params": (9e6, False)},
}


@pytest.mark.parametrize("text", FORMS)
def test_every_form_is_read(text):
    limits = Budget.parse(text).limits
    assert {name: (limit.value, limit.relative) for name, limit in limits.items()} == FORMS[text]


@pytest.mark.parametrize("text", ["", "x", "abc", "-1x", "1e9", "50%", "4Q", "params=", "0.5x,", "=", "nan", "1 2"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(TargetError, match=r"is not a target for params: write 0\.5x, or a number such as 100M or 7B"):
        Budget.parse(text)


def test_unknown_limits_zero_and_absolute_latency_are_refused():
    with pytest.raises(TargetError, match="'memory' is not a limit: choose from params, active_params"):
        Budget.parse("memory=1G")
    with pytest.raises(TargetError, match="params=0x is not above zero"):
        Budget.parse("0x")
    for text in ("3", "20m", "2G"):
        with pytest.raises(TargetError, match=rf"'{text}' is not a target for latency: write 0\.5x, or 20ms"):
            Budget.parse(f"latency={text}")


@pytest.mark.parametrize(
    "text", ["1x", "1.5x", "1000", "1M", "params=0.5x,kv_bytes=800", "latency=1x", "weight_bytes=2x"]
)
def test_a_target_that_is_not_below_the_parent_is_refused(text):
    with pytest.raises(TargetError, match=r"is not below the parent's [\d,]+: ask for less"):
        Budget.parse(text).check(PARENT)


@pytest.mark.parametrize("text", ["0.999x", "999", "latency=0.7x", "kv_bytes=0.5x,params=900"])
def test_a_target_below_the_parent_is_accepted(text):
    Budget.parse(text).check(PARENT)


def test_every_limit_must_be_met_and_latency_is_left_to_measurement():
    budget = Budget.parse("params=0.5x,kv_bytes=400,latency=0.1x")
    small = dataclasses.replace(PARENT, params=500, kv_bytes=400)
    assert budget.met_by(small, PARENT)
    assert not budget.met_by(dataclasses.replace(small, params=501), PARENT)
    assert not budget.met_by(dataclasses.replace(small, kv_bytes=401), PARENT)


def test_memory_is_weights_cache_and_state_together():
    budget = Budget.parse("memory_bytes=4700")
    assert PARENT.memory_bytes == 4800
    assert not budget.met_by(PARENT, PARENT)
    assert budget.met_by(dataclasses.replace(PARENT, kv_bytes=600, state_bytes=100), PARENT)


def test_a_measured_latency_is_a_limit_like_the_others():
    whole, half = dataclasses.replace(PARENT, latency_ms=20.0), dataclasses.replace(PARENT, latency_ms=9.9)
    for text in ("latency=0.5x", "latency=10ms"):
        assert Budget.parse(text).met_by(half, whole)
        assert not Budget.parse(text).met_by(whole, whole)
    with pytest.raises(TargetError, match="latency=25ms is not below the parent's 20"):
        Budget.parse("latency=25ms").check(whole)


def test_limits_resolved_against_one_parent_mean_the_same_for_another():
    budget = Budget.parse("params=0.5x,kv_bytes=100,latency=0.5x")
    assert str(budget.resolved(PARENT)) == "params=500,kv_bytes=100,latency=0.5x"
    timed = dataclasses.replace(PARENT, latency_ms=20.0)
    assert str(budget.resolved(timed)) == "params=500,kv_bytes=100,latency=10ms"


@pytest.mark.parametrize("text", ["0.5x", "params=0.5x,latency=0.7x", "latency=20ms", "134515007"])
def test_a_budget_reads_back_what_it_writes(text):
    assert str(Budget.parse(text)) == text
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)
