"""Layer importance: block influence of planted layers, and leaving layers out against naively masked models."""

import pytest
import torch
import torch.nn.functional as F

from nestling.errors import NestlingError
from nestling.ranking import Ranking, rank
from nestling.ranking.layers import greedy, leave_one_out
from nestling.surgery import masked
from tests.models import logits, tiny, token_batches

DAMAGES = ("perplexity", "kl", "output_error")


def without(model, ids, removed):
    """Logits and last hidden state of the model that `masked` makes of the other layers."""
    count = model.config.num_hidden_layers
    scores = torch.ones(count)
    scores[list(removed)] = 0
    shape, ranking = {"num_hidden_layers": count - len(removed)}, Ranking({"num_hidden_layers": scores})
    with masked(model, shape, ranking), torch.no_grad():
        return logits(model, ids), model.model(input_ids=ids).last_hidden_state


def naive(model, batches, damage, removed):
    """Mean damage per token, written out."""
    total, tokens = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        (whole, hidden), (cut, cut_hidden) = without(model, ids, []), without(model, ids, removed)
        if damage == "perplexity":
            total += sum(
                F.cross_entropy(row[:-1], line[1:], reduction="sum") for row, line in zip(cut, ids, strict=True)
            )
        elif damage == "kl":
            p, log_q = whole.softmax(-1), cut.log_softmax(-1)
            total += (p * (p.log() - log_q)).sum()
        else:
            total += ((hidden - cut_hidden).square().sum(-1) / hidden.square().sum(-1)).sum()
        tokens += ids[:, 1:].numel() if damage == "perplexity" else ids.numel()
    return float(total) / tokens


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "qwen2-sliding"])
def test_leave_one_out_is_the_damage_of_the_masked_model(variant, damage):
    model, batches = tiny(variant), token_batches(2)
    expected = torch.tensor([naive(model, batches, damage, [layer]) for layer in range(4)], dtype=torch.float64)
    torch.testing.assert_close(leave_one_out(model, batches, damage), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        rank(model, batches, layers=damage).scores["num_hidden_layers"], expected, rtol=1e-4, atol=1e-6
    )
    assert len(expected.unique()) == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_layers_that_are_gone_stay_gone(damage):
    model, batches = tiny("llama"), token_batches(2)
    found = leave_one_out(model, batches, damage, removed=[2])
    assert found[2] == float("inf")
    for layer in (0, 1, 3):
        assert found[layer].item() == pytest.approx(naive(model, batches, damage, [2, layer]), rel=1e-4)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side, damage):
    model = tiny("llama")
    rows = [batch["input_ids"][0] for batch in token_batches(3)]
    rows = [row[:length] for row, length in zip(rows, (12, 7, 3), strict=True)]
    padded, mask = torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12, dtype=torch.long)  # the last: padding alone
    for index, row in enumerate(rows):
        where = slice(12 - len(row), 12) if side == "left" else slice(0, len(row))
        padded[index, where], mask[index, where] = row, 1
    found = leave_one_out(model, [{"input_ids": padded, "attention_mask": mask}], damage)
    expected = leave_one_out(model, [{"input_ids": row[None]} for row in rows], damage)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    unmasked = leave_one_out(model, [{"input_ids": padded}], damage)
    assert not torch.allclose(unmasked, expected, rtol=1e-2)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_greedy_removes_what_repeated_leave_one_out_says(rounds):
    for seed in range(2):
        model, batches = tiny("llama", seed=seed), token_batches(2)
        removed: list[int] = []
        for _ in range(rounds):
            damage = {i: naive(model, batches, "kl", [*removed, i]) for i in range(4) if i not in removed}
            removed.append(min(damage, key=damage.get))
        rest = sorted((i for i in damage if i not in removed), key=damage.get)
        scores = greedy(model, batches, "kl", rounds)
        assert scores.argsort().tolist() == removed + rest
        ranking = rank(model, batches, layers="kl", greedy_layers=rounds)
        assert ranking["num_hidden_layers"].tolist() == (removed + rest)[::-1]


def test_progress_is_told_of_every_layer():
    model, seen = tiny("llama"), []
    leave_one_out(model, token_batches(2), "kl", removed=[0], progress=seen.append)
    assert sum(seen) == 6


def test_an_unknown_damage_is_refused():
    with pytest.raises(NestlingError, match="'loss' is not a layer metric: choose from perplexity, kl, output_error"):
        leave_one_out(tiny("llama"), token_batches(1), "loss")


# ---- block influence


def naive_influence(model, batches):
    total, tokens = torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            streams: list = []
            hooks = [
                layer.register_forward_hook(lambda m, args, out, streams=streams: streams.append((args[0], out)))
                for layer in model.model.layers
            ]
            model(**batch)
            for hook in hooks:
                hook.remove()
            for i, (before, after) in enumerate(streams):
                cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
                total[i] += (1 - cosine).sum()
            tokens += batch["input_ids"].numel()
    return total / tokens


def influence(model, batches):
    return rank(model, batches).scores["num_hidden_layers"]


@pytest.mark.parametrize("variant", ["llama", "olmo2"])
def test_block_influence_is_one_minus_the_cosine(variant):
    model, batches = tiny(variant), token_batches(2)
    torch.testing.assert_close(influence(model, batches), naive_influence(model, batches), rtol=1e-4, atol=1e-6)


def test_a_layer_that_adds_nothing_scores_zero_and_ranks_last():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    scores = influence(model, token_batches())
    assert scores[1].item() == pytest.approx(0, abs=1e-6)
    assert (scores[[0, 2, 3]] > 1e-3).all()
    assert rank(model, token_batches())["num_hidden_layers"][-1] == 1
    for damage in ("kl", "output_error"):
        assert leave_one_out(model, token_batches(), damage)[1].item() == pytest.approx(0, abs=1e-9)


def test_a_layer_that_turns_the_stream_round_scores_two():
    model = tiny("llama")
    model.model.layers[2].register_forward_hook(lambda module, args, output: -3 * args[0])
    scores = influence(model, token_batches())
    assert scores[2].item() == pytest.approx(2, abs=1e-6)
    assert scores.argmax() == 2


def test_padding_counts_in_no_cosine():
    model = tiny("llama")
    rows = [batch["input_ids"] for batch in token_batches(2, 1, 6)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[:, :6], mask[:, :6] = torch.cat(rows), 1
    alone = influence(model, [{"input_ids": row} for row in rows])
    torch.testing.assert_close(
        influence(model, [{"input_ids": ids, "attention_mask": mask}]), alone, rtol=1e-4, atol=1e-6
    )
    assert not torch.allclose(influence(model, [{"input_ids": ids}]), alone, rtol=1e-3)
