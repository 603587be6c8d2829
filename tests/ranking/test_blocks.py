"""Blocks of layers, tasks and iterative scores, each against the obvious slow way."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from nestling.anatomy import Anatomy
from nestling.errors import NestlingError, ShapeError
from nestling.ranking import rank
from nestling.ranking.blocks import block_scores, blocks
from nestling.ranking.layers import greedy, leave_one_out
from nestling.surgery import choose, prune
from nestling.surgery.iterate import rank_iteratively
from tests.models import tiny, token_batches
from tests.ranking.test_layers import naive


def streams(model, batches):
    """What enters each layer, and what leaves the last, of all tokens `[layers + 1, tokens, hidden]`."""
    found = [[] for _ in range(5)]
    for batch in batches:
        inputs = []
        hooks = [
            layer.register_forward_hook(lambda m, args, out, inputs=inputs: inputs.append((args[0], out)))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        for i, (before, after) in enumerate(inputs):
            found[i].append(before.flatten(0, 1))
            if i == 3:
                found[4].append(after.flatten(0, 1))
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("how", ["block_influence", "angular_distance"])
def test_a_block_is_compared_across_its_whole_length(how, length):
    model, batches = tiny("llama"), token_batches(2)
    seen = streams(model, batches)
    expected = []
    for start in range(4 - length + 1):
        cosines = F.cosine_similarity(seen[start], seen[start + length], dim=-1)
        each = 1 - cosines if how == "block_influence" else cosines.acos() / math.pi
        expected.append(each.mean())
    found = blocks(model, batches, length, how, keep_last=False)
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-4, atol=1e-6)
    kept = blocks(model, batches, length, how)
    torch.testing.assert_close(kept, found[: 4 - length])
    single = rank(model, batches).scores["num_hidden_layers"]
    if length > 1 and how == "block_influence":  # negative control: not the sum over its layers
        assert not torch.allclose(found[0], single[:length].sum(), rtol=1e-3)


@pytest.mark.parametrize("damage", ["perplexity", "kl", "output_error"])
def test_a_block_does_the_damage_of_the_model_without_it(damage):
    model, batches = tiny("llama"), token_batches(2)
    expected = torch.tensor([naive(model, batches, damage, [i, i + 1]) for i in range(2)], dtype=torch.float64)
    torch.testing.assert_close(blocks(model, batches, 2, damage), expected, rtol=1e-4, atol=1e-6)


def test_the_least_missed_block_goes_first():
    scores = block_scores(torch.tensor([0.5, 0.1, 0.9]), 2, torch.tensor([3.0, 1.0, 2.0, 4.0, 0.5]))
    assert scores.argsort().tolist() == [2, 1, 4, 0, 3]
    model, batches = tiny("llama"), token_batches(2)
    for layers in ("block_influence", "kl"):
        start = int(blocks(model, batches, 2, layers).argmin())
        ranking = rank(model, batches, layers=layers, layer_block=2)
        assert sorted(ranking["num_hidden_layers"].tolist()[-2:]) == [start, start + 1]
        assert prune(model, ranking, {"num_hidden_layers": 2}).config.num_hidden_layers == 2


def test_padding_counts_for_nothing():
    model, rows = tiny("llama"), token_batches(1, 2, 6)[0]["input_ids"]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[:, :6], mask[:, :6] = rows, 1
    alone, padded = [{"input_ids": rows}], [{"input_ids": ids, "attention_mask": mask}]
    for how in ("block_influence", "kl"):
        torch.testing.assert_close(blocks(model, padded, 2, how), blocks(model, alone, 2, how), rtol=1e-4, atol=1e-6)


def score(model):
    """A task: how well the model knows one text; higher is better."""
    batch = token_batches(1, seed=5)[0]
    with torch.no_grad():
        return -model(**batch, labels=batch["input_ids"]).loss.item()


def test_a_task_scores_layers_blocks_and_greedy_removal():
    model, batches = tiny("llama"), token_batches(1)
    text = token_batches(1, seed=5)
    whole = naive(model, text, "perplexity", [])
    for removed, found in [
        *(([i], loss) for i, loss in enumerate(leave_one_out(model, batches, score).tolist())),
        *(([i, i + 1], loss) for i, loss in enumerate(blocks(model, batches, 2, score).tolist())),
    ]:
        assert found == pytest.approx(naive(model, text, "perplexity", removed) - whole, rel=1e-3, abs=1e-6)
    ranking = rank(model, batches, task=score)
    assert ranking["num_hidden_layers"].tolist() == leave_one_out(model, batches, score).argsort().tolist()[::-1]
    assert ranking.info["layers"] == "task"
    order = greedy(model, batches, score, 2).argsort().tolist()
    assert order[0] == int(leave_one_out(model, batches, score).argmin())
    assert order[1] == int(leave_one_out(model, batches, score, removed=order[:1]).argmin())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_cannot_be_removed_is_refused():
    model, batches = tiny("llama"), token_batches(1)
    for length in (0, 4):
        with pytest.raises(NestlingError, match=f"layer_block {length} is not possible"):
            blocks(model, batches, length)
    with pytest.raises(NestlingError, match="'depth' is not a metric of blocks"):
        blocks(model, batches, 1, "depth")


# ---- cut a little, score again


def test_one_round_is_one_shot():
    model, batches = tiny("llama"), token_batches(2)
    assert (
        rank_iteratively(model, batches, {"intermediate_size": 12}, 1).fingerprint == rank(model, batches).fingerprint
    )


@pytest.mark.parametrize("variant", ["llama", "qwen3", "olmo2"])
def test_each_round_scores_the_model_that_the_last_one_left(variant):
    """Against really cutting, ranking the child anew, and cutting that."""
    model, batches = tiny(variant), token_batches(2)
    target, between = {"intermediate_size": 12, "hidden_size": 24}, {"intermediate_size": 28, "hidden_size": 36}
    if variant != "llama":
        between["hidden_size"] = (model.config.hidden_size + 24) // 2
    first = prune(model, rank(model, batches), between)
    expected = prune(first, rank(first, batches), target)
    found = prune(model, rank_iteratively(model, batches, target, 2), target)
    for (name, ours), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_rounds_change_the_choice():
    model, batches = tiny("llama"), token_batches(2)
    target = {"hidden_size": 24, "intermediate_size": 6, "num_attention_heads": 2}
    once, often = (rank_iteratively(model, batches, target, rounds) for rounds in (1, 4))
    anatomy = Anatomy.of(model)
    indices = [
        [choose(anatomy, ranking, target).index(spec) for spec in anatomy.tensors.values()] for ranking in (once, often)
    ]
    assert str(indices[0]) != str(indices[1])
    assert often.info["rounds"] == 4
    for wrong in ({"intermediate_size": [1, 2, 3, 4]}, {"intermediate_size": 12}):
        with pytest.raises(ShapeError, match="at least 1 round, and one size"):
            rank_iteratively(model, batches, wrong, 0 if isinstance(wrong["intermediate_size"], int) else 2)


def test_the_verb_takes_blocks_tasks_and_rounds(tmp_path, capsys):
    from nestling.cli import main
    from nestling.ranking import Ranking
    from tests.checkpoint import write

    folder = write(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"sentence_good": "the cat sat", "sentence_bad": "cat the sat"}) + "\n")
    common = ["rank", str(folder), "--calibration_tokens", "64", "--context", "16", "--generated", "0"]
    for extra in (
        ["--layer_block", "1"],
        ["--layer_task", str(pairs)],
        ["--rounds", "2", "--to_shape", "intermediate_size=8"],
    ):
        out = tmp_path / f"{extra[0]}.safetensors"
        assert main([*common, "--out", str(out), *extra]) == 0, capsys.readouterr().err
        assert Ranking.load(out).info["metric"]
    assert main([*common, "--out", str(tmp_path / "x"), "--rounds", "2"]) == 2
    assert "--to_shape" in capsys.readouterr().err
