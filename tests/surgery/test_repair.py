"""Repair against a ridge regression solved independently, and what it must not do."""

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.errors import DataError
from nestling.ranking import Ranking
from nestling.surgery import prune
from nestling.surgery.choose import choose
from nestling.surgery.repair import Repair
from tests.models import logits, random_ranking, tiny, token_batches

SHAPE = {"intermediate_size": 28}


def seen(model, module, batches):
    """What a module reads and returns, over all tokens."""
    caught = []
    hook = module.register_forward_hook(lambda module, args, output: caught.append((args[0], output)))
    for batch in batches:
        logits(model, batch["input_ids"])
    hook.remove()
    return [torch.cat([pair[i].flatten(0, 1) for pair in caught]) for i in (0, 1)]


def ridge_regression(inputs, target, stream):
    """Independent of the code: least squares on an extended design, tokens weighed by the length of the stream."""
    weight = 1 / stream.norm(dim=-1, keepdim=True)
    scale = (inputs[1] * weight).square().sum(0).mean().sqrt()
    kept = inputs[0] * weight
    design = torch.cat([kept, scale * torch.eye(kept.shape[1], dtype=torch.float64)])
    wanted = torch.cat([target * weight, torch.zeros(kept.shape[1], target.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(design, wanted).solution.T


@pytest.mark.parametrize("variant", ["llama-biases", "phi3", "nemotron", "gemma3_text-tied"])
def test_is_the_ridge_regression_of_pruned_on_kept_units(variant):
    model = tiny(variant)
    ranking, batches = random_ranking(model), token_batches(6)
    selection = choose(Anatomy.of(model), ranking, SHAPE)
    child = prune(model, ranking, SHAPE, repair=batches)
    for layer in (0, 3):
        down = model.model.layers[layer].mlp.down_proj
        inputs, _ = seen(model, down, batches)
        _, stream = seen(model, model.model.layers[layer], batches)
        kept = selection.index(Anatomy.of(model).tensors[f"model.layers.{layer}.mlp.down_proj.weight"])[-1]
        pruned = torch.tensor(sorted(set(range(44)) - set(kept.tolist())))
        lost = inputs[:, pruned] @ down.weight[:, pruned].T
        expected = down.weight[:, kept] + ridge_regression((inputs[:, kept], inputs), lost, stream)
        torch.testing.assert_close(child.model.layers[layer].mlp.down_proj.weight, expected, rtol=1e-8, atol=1e-10)
        assert not torch.allclose(expected, down.weight[:, kept], atol=1e-3)


def without_layers(model, *gone):
    """A ranking by which these layers go."""
    scores = torch.arange(4, 0, -1.0) + 10
    scores[list(gone)] = 0.0
    return Ranking(dict(random_ranking(model).scores) | {"num_hidden_layers": scores})


@pytest.mark.parametrize(("variant", "gain"), [("llama", 1.0), ("granite", 0.7)])
def test_removed_layers_are_folded_into_the_one_before(variant, gain):
    model, batches = tiny(variant), token_batches(6)
    shape = SHAPE | {"num_hidden_layers": 2}
    ranking = without_layers(model, 1, 2)
    child = prune(model, ranking, shape, repair=batches)
    selection = choose(Anatomy.of(model), ranking, shape)
    down = model.model.layers[0].mlp.down_proj
    inputs, _ = seen(model, down, batches)
    _, stream = seen(model, model.model.layers[0], batches)
    _, wanted = seen(model, model.model.layers[2], batches)
    kept = selection.index(Anatomy.of(model).tensors["model.layers.0.mlp.down_proj.weight"])[-1]
    pruned = torch.tensor(sorted(set(range(44)) - set(kept.tolist())))
    lost = inputs[:, pruned] @ down.weight[:, pruned].T + (wanted - stream) / gain
    expected = down.weight[:, kept] + ridge_regression((inputs[:, kept], inputs), lost, stream)
    torch.testing.assert_close(child.model.layers[0].mlp.down_proj.weight, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("variant", ["gemma3_text", "olmo2"])
def test_nothing_is_folded_through_a_norm(variant):
    model, batches = tiny(variant), token_batches()
    ranking, shape = without_layers(model, 1), {"num_hidden_layers": 3}
    plain, repaired = (prune(model, ranking, shape, repair=r) for r in (None, batches))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), repaired.parameters(), strict=True))


def test_layers_without_one_before_them_are_let_go():
    model, batches = tiny("llama"), token_batches()
    ranking, shape = without_layers(model, 0), {"num_hidden_layers": 3}
    plain, repaired = (prune(model, ranking, shape, repair=r) for r in (None, batches))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), repaired.parameters(), strict=True))


def test_writes_closer_to_the_parent_than_a_plain_cut():
    model = tiny("llama")
    ranking, batches = random_ranking(model), token_batches(20)
    ids = batches[0]["input_ids"]
    wanted = logits(model, ids)
    plain, repaired = (logits(prune(model, ranking, SHAPE, repair=r), ids) for r in (None, batches))
    assert (repaired - wanted).norm() < (plain - wanted).norm()


def test_an_infinite_ridge_is_a_plain_cut():
    model = tiny("llama")
    selection = choose(Anatomy.of(model), random_ranking(model), SHAPE)
    for name, weight in Repair(model, token_batches(), ridge=1e30).refit(selection).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach())


def test_touches_nothing_where_nothing_is_cut():
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    child = prune(model, random_ranking(model), {"num_hidden_layers": 4}, repair=token_batches())
    for name, value in child.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_is_left_out():
    model = tiny("llama")
    ranking, batches = random_ranking(model), token_batches(4, seq=6)
    padded = [
        {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4), value=50),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 4)),
        }
        for batch in batches
    ]
    children = [prune(model, ranking, SHAPE, repair=rows) for rows in (batches, padded)]
    for a, b in zip(*(child.parameters() for child in children), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


SHAPES = [
    SHAPE,
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 2, "intermediate_size": 20},
    SHAPE | {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 36},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_measured_once_for_many_cuts_or_anew_for_each_is_the_same(monkeypatch, shape):
    model = tiny("llama")
    ranking, batches = without_layers(model, 1, 2), token_batches()
    passes = []
    shared = Repair(model, batches, progress=passes.append)
    shared.measure(choose(Anatomy.of(model), ranking, other) for other in SHAPES)
    once = [prune(model, ranking, other, repair=shared) for other in SHAPES][SHAPES.index(shape)]
    assert len(passes) == len(batches)
    monkeypatch.setattr("nestling.surgery.repair.MOMENTS_BYTES", 1)
    again = prune(model, ranking, shape, repair=Repair(model, batches, progress=passes.append))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert len(passes) > len(batches)


MIXED = {"mamba_num_heads": 4, "mamba_head_dim": 7, "intermediate_size": 20, "num_attention_heads": 4}


def test_what_reads_a_norm_over_cut_units_is_left_alone():
    model, batches = tiny("nemotron_h"), token_batches(6)
    ranking = random_ranking(model)
    plain, repaired = (prune(model, ranking, MIXED, repair=r) for r in (None, batches))
    changed = [
        name
        for (name, a), b in zip(plain.named_parameters(), repaired.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert changed == ["model.layers.1.mixer.down_proj.weight", "model.layers.2.mixer.o_proj.weight"]


def test_a_whole_mixer_takes_over_the_layers_after_it():
    model, batches = tiny("nemotron_h"), token_batches(6)
    ranking, shape = without_layers(model, 1), {"num_hidden_layers": 3}
    plain, repaired = (prune(model, ranking, shape, repair=r) for r in (None, batches))
    ids = batches[0]["input_ids"]
    wanted = logits(model, ids)
    assert (logits(repaired, ids) - wanted).norm() < (logits(plain, ids) - wanted).norm()
    assert not torch.equal(plain.model.layers[0].mixer.out_proj.weight, repaired.model.layers[0].mixer.out_proj.weight)


def test_no_batches_are_refused():
    model = tiny("llama")
    with pytest.raises(DataError, match="no batches"):
        prune(model, random_ranking(model), SHAPE, repair=[])
