"""Merging: alike experts merge without loss, in whatever order their neurons stand; groups and weights by hand."""

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.moe import loads, merge
from nestling.moe.ffn import expert_axis, expert_tensors
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


ANY = ["qwen3_moe", "olmoe", "granitemoeshared", "gpt_oss", "deepseek_v3", "nemotron_h-moe", "nemotron_h-latent"]


@pytest.mark.parametrize("variant", ANY)
def test_experts_that_are_copies_merge_without_loss_wherever_they_stand(variant):
    """The second half of the experts is the first, neurons in another order, as a slow loop over elements writes it."""
    model = tiny(variant)
    anatomy = Anatomy.of(model)
    axis = expert_axis(anatomy.architecture)
    weights, scores = model.state_dict(), [torch.zeros(0)] * anatomy.num_layers
    for layer in anatomy.routed_layers():
        sizes = anatomy.sizes(layer)
        count, width = anatomy.units(axis, layer), sizes["neuron"]
        half = count // 2
        scores[layer] = torch.tensor([1.0] * half + [0.0] * (count - half))
        if axis.within:  # as many of each group stay
            scores[layer] = scores[layer].view(2, -1).T.flatten()
        kept = scores[layer].nonzero().flatten().tolist()
        gone = [i for i in range(count) if i not in kept]
        router = weights[f"{anatomy.layer_path(layer)}.{anatomy.architecture.routed.router}.weight"]
        for one, other in zip(kept, gone, strict=False):
            shuffle = torch.randperm(width)
            router[other] = router[one]
            for spec in expert_tensors(anatomy, layer):
                tensor = weights[spec.name]
                tensor[other] = tensor[one]
                for dim, dimension in enumerate(spec.layout[1:]):
                    owners = dimension.owner(("neuron",), sizes)
                    if "neuron" in dimension.letters:
                        places = [(owners == n).nonzero().flatten() for n in range(width)]
                        source, target = torch.cat([places[n] for n in shuffle]), torch.cat(places)
                        moved = tensor[one].index_select(dim, source)
                        tensor[other] = torch.zeros_like(moved).index_copy(dim, target, moved)
    ranking = Ranking({axis.field: tuple(scores)})
    keep = max(int(score.sum()) for score in scores if len(score))
    uses = [torch.rand(anatomy.units(axis, layer)) for layer in anatomy.routed_layers()]
    merged, dropped = merge(model, ranking, keep, uses), prune(model, ranking, {axis.field: keep})
    for (name, found), expected in zip(merged.state_dict().items(), dropped.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
