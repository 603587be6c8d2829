"""Merging: alike experts merge without loss, in whatever order their neurons stand; groups and weights by hand."""

import pytest
import torch

from nestling.anatomy import ARCHITECTURES
from nestling.errors import UnsupportedArchitecture
from nestling.moe import loads, merge
from nestling.moe.convert import axes_of
from nestling.moe.merge import aligned, groups
from nestling.ranking import Ranking
from nestling.surgery import prune
from tests.models import logits, random_ranking, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]
KEEP = Ranking({"num_local_experts": tuple(torch.tensor([5.0, 4, 3, 0, 1, 2]) for _ in range(4))})


def doubled(shuffled: bool):
    """A mixture whose experts 3, 4, 5 are 0, 1, 2 again, neurons in another order."""
    model = tiny("mixtral")
    for layer in model.model.layers:
        experts, gate = layer.mlp.experts, layer.mlp.gate.weight.data
        for one, other in ((0, 3), (1, 4), (2, 5)):
            order = torch.randperm(14) if shuffled else torch.arange(14)
            rows = torch.cat([order, order + 14])
            experts.gate_up_proj.data[other] = experts.gate_up_proj.data[one][rows]
            experts.down_proj.data[other] = experts.down_proj.data[one][:, order]
            gate[other] = gate[one]
    return model


@pytest.mark.parametrize("shuffled", [False, True])
def test_copies_merge_into_the_expert_they_copy(shuffled):
    model = doubled(shuffled)
    uses = [torch.rand(6) for _ in range(4)]
    merged, dropped = merge(model, KEEP, 3, uses), prune(model, KEEP, {"num_local_experts": 3})
    for (name, found), expected in zip(merged.state_dict().items(), dropped.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_averages_are_weighted_by_use():
    model = doubled(False)
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data[3] = experts.down_proj.data[0] * 3
    uses = [torch.tensor([3.0, 1, 1, 1, 1, 1])] + [torch.ones(6)] * 3
    found = merge(model, KEEP, 3, uses).model.layers[0].mlp.experts.down_proj[0]
    torch.testing.assert_close(found, experts.down_proj[0] * 1.5, rtol=1e-4, atol=1e-5)


def test_groups_follow_router_rows_and_kept_ones_stay():
    rows = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [1.0, 0]])
    assert groups(rows, torch.tensor([0, 1, 3])).tolist()[2] in (0, 3)
    assert groups(rows, torch.tensor([1, 3])).tolist() == [3, 1, 3, 3]


def test_alignment_finds_a_permutation():
    one, order = torch.randn(9, 5), torch.randperm(9)
    assert torch.equal(one[order][aligned(one, one[order])], one)


def test_merging_changes_more_than_dropping_nothing():
    model = tiny("qwen3_moe")
    child = merge(model, random_ranking(model), 4, loads(model, token_batches(1)))
    assert child.config.num_experts == 4
    assert torch.isfinite(logits(child, IDS)).all()
    assert merge(model, random_ranking(model), 6, loads(model, token_batches(1))).config.num_experts == 6


def test_grouped_experts_are_not_merged():
    with pytest.raises(UnsupportedArchitecture, match="converted"):
        merge(tiny("deepseek_v3"), random_ranking(tiny("deepseek_v3")), 4, [])


@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h"])
def test_experts_that_are_kept_in_another_way_are_refused(kind):
    with pytest.raises(UnsupportedArchitecture, match="one above the other"):
        axes_of(ARCHITECTURES[kind])
