"""Layers that share tensors: one choice for all of them, ranked over all uses, counted once, still taken in turn."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from nestling import dmc, elastic
from nestling.anatomy import Anatomy
from nestling.anatomy.sharing import Sharing
from nestling.cost import cost
from nestling.errors import ShapeError, UnsupportedArchitecture
from nestling.ranking import METRICS, Ranking, rank
from nestling.surgery import masked, prune
from nestling.surgery.repair import Repair
from tests.models import SHARED, in_float64, logits, random_ranking, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]
FFN = "intermediate_size"
TWO = Sharing("block", takers=(1, 3, 4, 6), count=2, tied=True)


@pytest.fixture(autouse=True)
def _exact():
    with in_float64():
        yield


def untied(model):
    """The same function, with tensors of its own in every layer."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    apart = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    apart.load_state_dict(model.state_dict())
    return apart


def test_who_shares_with_whom():
    assert [TWO.sharers(layer) for layer in (0, 1, 6)] == [(0,), (1, 4), (3, 6)]
    assert Sharing("block", TWO.takers, 2, tied=False).sharers(4) == (4,)
    assert TWO.turns(4) == (1, 4)
    assert [TWO.is_copy(layer, (0, 4, 6)) for layer in (0, 4, 6)] == [False] * 3
    assert [TWO.is_copy(layer, (1, 3, 4, 6)) for layer in (1, 3, 4, 6)] == [False, False, True, True]
    assert TWO.named("list.{use}.0", 4, (1, 4, 6)) == "list.1.0"


@pytest.mark.parametrize(
    ("kept", "fine"),
    [
        ((1, 3, 4, 6), True),
        ((3, 4, 6), True),
        ((1, 3), True),
        ((4,), True),
        ((), True),
        ((1, 4), False),
        ((1, 6), True),
    ],
)
def test_layers_that_stay_take_the_sets_in_turn(kept, fine):
    assert TWO.in_turn((0, 2, *kept)) is fine


@pytest.mark.parametrize("variant", SHARED)
def test_units_are_scored_over_all_uses(variant):
    model, batches = tiny(variant), token_batches(2, 2, 5)
    apart = untied(model)
    torch.testing.assert_close(logits(apart, IDS), logits(model, IDS), atol=1e-12, rtol=0)
    anatomy = Anatomy.of(model)
    for metric in sorted(set(METRICS) - {"random", "reap", "frequency", "gate"}):
        together, single = rank(model, batches, metric).scores, rank(apart, batches, metric).scores
        for field, axis in anatomy.axes.items():
            for layer in range(anatomy.num_layers) if axis.scope == "layer" else ():
                if anatomy.has(axis, layer):
                    expected = sum(single[field][use] for use in anatomy.uses(axis, layer))
                    torch.testing.assert_close(together[field][layer], expected, rtol=1e-6, atol=1e-9)
    assert anatomy.uses(anatomy.axis(FFN), 4) == ((1, 3, 4) if variant == "zamba2" else (1, 4))
    assert anatomy.uses(anatomy.axis("mamba_headdim"), 4) == (4,)


def test_a_ranking_that_differs_between_uses_is_read_at_the_first():
    model, shape = tiny("zamba2"), {FFN: 20}
    ranking = random_ranking(model)
    same = Ranking(
        dict(ranking.scores) | {FFN: tuple(s if not len(s) else ranking.scores[FFN][1] for s in ranking.scores[FFN])}
    )
    other = Ranking(
        dict(ranking.scores) | {FFN: tuple(s if not len(s) else ranking.scores[FFN][4] for s in ranking.scores[FFN])}
    )
    found = logits(prune(model, ranking, shape), IDS)
    assert torch.equal(found, logits(prune(model, same, shape), IDS))
    assert not torch.allclose(found, logits(prune(model, other, shape), IDS), atol=1e-3)
    assert not torch.allclose(found, logits(prune(untied(model), ranking, shape), IDS), atol=1e-3)


def test_layers_of_their_own_may_keep_other_units():
    model = untied(tiny("zamba2-two"))
    ranking, shape = random_ranking(model), {FFN: 20, "num_attention_heads": 4, "num_hidden_layers": 4}
    child = prune(model, ranking, shape)
    with masked(model, shape, ranking):
        torch.testing.assert_close(logits(model, IDS), logits(child, IDS), atol=1e-10, rtol=0)
    assert child.num_parameters() == cost(model, shape, layers=[1, 3, 4, 0]).params


def test_a_child_ties_what_its_parent_ties():
    model = tiny("zamba2")
    child = prune(model, random_ranking(model), {FFN: 20})
    weights = child.state_dict(keep_vars=True)
    place = "model.layers.{}.shared_transformer.feed_forward.down_proj.weight".format
    assert weights[place(1)] is weights[place(3)] is weights[place(4)]
    assert child.num_parameters() == cost(model, {FFN: 20}).params


@pytest.mark.parametrize("gone", [1, 3, 4])
def test_one_block_loses_any_layer_and_adapters_are_numbered_anew(gone):
    model = tiny("zamba2")
    depth = torch.ones(5)
    depth[gone] = 0
    ranking = Ranking(dict(random_ranking(model).scores) | {"num_hidden_layers": depth})
    child = prune(model, ranking, {"num_hidden_layers": 4})
    with masked(model, {"num_hidden_layers": 4}, ranking):
        expected = logits(model, IDS)
    torch.testing.assert_close(logits(child, IDS), expected, atol=1e-10, rtol=0)
    place = child.model.layers[1 if gone != 1 else 2].shared_transformer.feed_forward.gate_up_proj_adapter_list
    assert len(place) == 2
    with torch.no_grad():  # negative control: the adapters of the two layers exchanged
        a, b = place[0][1].weight.clone(), place[1][1].weight.clone()
        place[0][1].weight.copy_(b)
        place[1][1].weight.copy_(a)
    assert not torch.allclose(logits(child, IDS), expected, atol=1e-3)


def test_layers_out_of_turn_are_refused_and_not_chosen():
    model = tiny("zamba2-two")
    anatomy = Anatomy.of(model)
    with pytest.raises(ShapeError, match="in turn"):
        cost(model, {}, layers=[0, 1, 2, 4])
    assert anatomy.by_importance([4, 3, 2, 1, 0]) == [1, 3, 4, 2, 0]


@pytest.mark.parametrize("variant", SHARED)
def test_repair_refits_what_is_shared_over_all_uses(variant):
    model, batches = tiny(variant), token_batches(2, 2, 30)
    ranking, shape = rank(model, batches), {FFN: 34}
    repaired = prune(model, ranking, shape, repair=Repair(model, batches))
    plain = prune(model, ranking, shape)
    name = "model.layers.1.shared_transformer.feed_forward.down_proj.weight"
    kept = ranking.order(FFN, 1)[:34].sort().values
    gone = torch.tensor([unit for unit in range(44) if unit not in kept.tolist()])
    moments = torch.zeros(44, 44, dtype=torch.float64)
    uses = Anatomy.of(model).sharing.sharers(1)

    def add(layer):
        seen = []

        def weigh(module, args, stream):
            rows = (seen.pop() / stream.norm(dim=-1, keepdim=True)).flatten(0, 1)
            moments.add_(rows.T @ rows)

        block = model.model.layers[layer]
        down = block.shared_transformer.feed_forward.down_proj
        down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block.register_forward_hook(weigh)

    for layer in uses:
        add(layer)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    weight = model.state_dict()[name]
    system = moments[kept][:, kept] + moments.diagonal().mean() * torch.eye(34, dtype=torch.float64)
    expected = weight[:, kept] + torch.linalg.solve(system, moments[kept][:, gone] @ weight[:, gone].T).T
    torch.testing.assert_close(repaired.state_dict()[name], expected, atol=1e-8, rtol=1e-6)
    assert not torch.allclose(plain.state_dict()[name], expected, atol=1e-3)


def test_methods_that_do_not_know_shared_tensors_say_so():
    model = tiny("zamba2")
    with pytest.raises(UnsupportedArchitecture, match="share"):
        elastic.check(Anatomy.of(model), ["0.9x"], elastic.ElasticSettings())
    with pytest.raises(UnsupportedArchitecture):
        dmc.convert(model)


def test_heads_beside_adapters_go_with_the_width():
    model = tiny("zamba2")
    with pytest.raises(ShapeError, match="2 x hidden_size = 96"):
        prune(model, random_ranking(model), {"num_attention_heads": 4})
    with pytest.raises(ShapeError, match="one size for all layers"):
        prune(model, random_ranking(model), {FFN: [20, 20, 20, 20, 19]})
    with pytest.raises(ShapeError, match="multiple of hidden_size"):
        prune(model, random_ranking(model), {"n_mamba_heads": 10})
