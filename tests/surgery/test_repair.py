"""Repair against a ridge regression solved independently, and what it must not do."""

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.errors import DataError
from nestling.surgery import prune
from nestling.surgery.choose import choose
from nestling.surgery.repair import Repair
from tests.models import logits, random_ranking, tiny, token_batches

SHAPE = {"intermediate_size": 28}


def read(model, module, batches):
    """What a module reads and writes, over all tokens."""
    seen = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for batch in batches:
        logits(model, batch["input_ids"])
    hook.remove()
    return [torch.cat([pair[i].flatten(0, 1) for pair in seen]) for i in (0, 1)]


@pytest.mark.parametrize("variant", ["llama-biases", "phi3", "nemotron", "gemma3_text-tied"])
def test_is_the_ridge_regression_of_pruned_on_kept_units(variant):
    model = tiny(variant)
    ranking, batches = random_ranking(model), token_batches(6)
    selection = choose(Anatomy.of(model), ranking, SHAPE)
    child = prune(model, ranking, SHAPE, repair=batches)
    for layer in (0, 3):
        down = model.model.layers[layer].mlp.down_proj
        inputs, outputs = read(model, down, batches)
        kept = selection.index(Anatomy.of(model).tensors[f"model.layers.{layer}.mlp.down_proj.weight"])[-1]
        pruned = torch.tensor(sorted(set(range(44)) - set(kept.tolist())))
        scaled = inputs / outputs.norm(dim=-1, keepdim=True)
        ridge = scaled.square().sum(0).mean().sqrt()
        design = torch.cat([scaled[:, kept], ridge * torch.eye(len(kept), dtype=torch.float64)])
        target = torch.cat([scaled[:, pruned], torch.zeros(len(kept), len(pruned), dtype=torch.float64)])
        share = torch.linalg.lstsq(design, target).solution
        expected = down.weight[:, kept] + down.weight[:, pruned] @ share.T
        torch.testing.assert_close(child.model.layers[layer].mlp.down_proj.weight, expected, rtol=1e-8, atol=1e-10)
        assert not torch.allclose(expected, down.weight[:, kept], atol=1e-3)


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


def test_many_passes_give_what_one_gives(monkeypatch):
    model = tiny("llama")
    ranking, batches = random_ranking(model), token_batches()
    shape = SHAPE | {"num_attention_heads": 4, "num_hidden_layers": 3}
    seen = []
    shared = Repair(model, batches, progress=seen.append)
    once = [prune(model, ranking, s, repair=shared) for s in (SHAPE, shape)][1]
    assert len(seen) == len(batches)
    monkeypatch.setattr("nestling.surgery.repair.MOMENTS_BYTES", 1)
    again = prune(model, ranking, shape, repair=Repair(model, batches, progress=seen.append))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    assert len(seen) == (1 + 6) * len(batches)


def test_no_batches_are_refused():
    model = tiny("llama")
    with pytest.raises(DataError, match="no batches"):
        prune(model, random_ranking(model), SHAPE, repair=[])
