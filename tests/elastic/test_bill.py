"""The differentiable bill is `cost`, for every architecture and every figure."""

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.cost import cost_of_form
from nestling.elastic.bill import METRICS, Bill
from nestling.errors import TargetError
from nestling.shape import fit
from tests.elastic.toy import one_hot, sorted_parent, space_of
from tests.models import SHARED, VARIANTS


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in SHARED])
def test_at_a_hard_choice_it_is_the_cost(variant):
    model, ranking = sorted_parent(variant)
    space, bill = space_of(model, ranking), Bill(Anatomy.of(model), 64)
    for seed in range(3):
        chances, sizes = one_hot(space, seed)
        form = fit(space.anatomy, space.shape(sizes), space.kept(sizes), check_config=False)
        exact = cost_of_form(space.anatomy, form, 64)
        for metric in METRICS:
            expected = getattr(exact, metric)
            assert bill(metric, *space.expected(chances)).item() == pytest.approx(expected, abs=1)
            assert bill(metric, *space.exactly(sizes)).item() == pytest.approx(expected, abs=1)


def test_a_layer_that_may_go_costs_its_chance():
    model, _ = sorted_parent("llama")
    bill = Bill(Anatomy.of(model))
    sizes, gates = bill.whole()
    whole, none = bill("params", sizes, gates), bill("params", sizes, 0 * gates)
    assert bill("params", sizes, gates / 4).item() == pytest.approx((none + (whole - none) / 4).item())
    with pytest.raises(TargetError, match="latency"):
        bill("latency", sizes, torch.ones(4))
