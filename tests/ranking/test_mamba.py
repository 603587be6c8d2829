"""Scores of Mamba-2: places inside the mixer against hand-made hooks, planted dead units, heads by their channels."""

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.errors import NestlingError
from nestling.ranking import Ranking, nested, rank
from nestling.surgery import prune
from tests.models import in_float64, logits, random_ranking, tiny, token_batches

HEADS, CHANNELS, GROUPS, STATE = 6, 9, 2, 5
INNER, SHARED = HEADS * CHANNELS, GROUPS * STATE
BATCHES = token_batches(3)


def projected(model, layer=0):
    """What the mixer's projection writes, over all batches `[rows, seq, out]`."""
    caught = []
    hook = model.model.layers[layer].mixer.in_proj.register_forward_hook(lambda m, a, out: caught.append(out))
    for batch in BATCHES:
        logits(model, batch["input_ids"])
    hook.remove()
    return torch.cat(caught)


def minitron(values):
    """Mean of magnitudes over the sequence, L2 over rows."""
    return values.abs().mean(1).square().sum(0).sqrt()


def test_channels_are_read_where_the_paper_reads_them():
    model = tiny("nemotron_h")
    out = projected(model)
    for place, start in (("z", 0), ("x", INNER)):
        found = rank(model, BATCHES, metric={"mamba_head_dim": f"activation@{place}"}).scores["mamba_head_dim"][0]
        torch.testing.assert_close(found, minitron(out[..., start : start + INNER]), rtol=1e-5, atol=1e-7)


def test_states_are_scored_by_b_times_c():
    model = tiny("nemotron_h")
    out = projected(model)
    b, c = (out[..., 2 * INNER + i * SHARED : 2 * INNER + (i + 1) * SHARED] for i in (0, 1))
    found = rank(model, BATCHES).scores["ssm_state_size"][0]
    torch.testing.assert_close(found, minitron(b) * minitron(c), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", [None, "activation@x", "activation@o"])
def test_dead_heads_channels_and_states_come_last(metric):
    model = tiny("nemotron_h")
    with torch.no_grad():
        for layer in (0, 3):
            mixer = model.model.layers[layer].mixer
            head, channel, state = slice(2 * CHANNELS, 3 * CHANNELS), 4 * CHANNELS + 3, 2 * INNER + STATE + 2
            for dead in (head, channel):
                mixer.out_proj.weight[:, dead] = 0
                mixer.norm.weight[dead] = 0
                for start in (0, INNER):
                    rows = slice(start + head.start, start + head.stop) if dead is head else start + channel
                    mixer.in_proj.weight[rows] = 0
            mixer.in_proj.weight[state] = 0
    chosen = {"mamba_num_heads": metric, "mamba_head_dim": metric} if metric else None
    ranking = rank(model, BATCHES, metric=chosen)
    for layer in (0, 3):
        assert ranking.order("mamba_num_heads", layer)[-1] == 2
        assert (ranking.order("mamba_head_dim", layer) // CHANNELS)[-CHANNELS - 1 :].unique().tolist() == [2, 4]
        assert ranking.order("ssm_state_size", layer)[-1] == STATE + 2


def test_cutting_dead_units_changes_nothing():
    model = tiny("nemotron_h", n_groups=1, mamba_num_heads=4)
    with torch.no_grad():
        for layer in (0, 3):
            mixer, inner = model.model.layers[layer].mixer, 4 * CHANNELS
            for tensor in (mixer.in_proj.weight, mixer.conv1d.weight, mixer.conv1d.bias):
                start = 2 * inner if tensor is mixer.in_proj.weight else inner
                tensor[start + 3] = 0  # B of one state: it stays empty
    before = logits(model, BATCHES[0]["input_ids"])
    child = prune(model, rank(model, BATCHES), {"ssm_state_size": STATE - 1})
    torch.testing.assert_close(logits(child, BATCHES[0]["input_ids"]), before, rtol=1e-4, atol=1e-5)


def toy():
    """Scores of channels `[heads, channels]` = [[3, 1], [0, 2], [4, 0], [1, 5]] in one layer, none in the others."""
    anatomy = Anatomy.of(tiny("nemotron_h", mamba_num_heads=4, mamba_head_dim=2))
    scores = torch.tensor([3.0, 1, 0, 2, 4, 0, 1, 5])
    return anatomy, Ranking({"mamba_head_dim": (scores, torch.zeros(0), torch.zeros(0), scores)})


def test_heads_by_hand():
    anatomy, ranking = toy()
    whole = nested(anatomy, ranking).scores
    root = torch.tensor([9.0 + 1, 4, 16, 1 + 25]).sqrt()
    torch.testing.assert_close(whole["mamba_num_heads"][0], root)
    over_heads = torch.tensor([9.0 + 16 + 1, 1 + 4 + 25]).sqrt()
    torch.testing.assert_close(whole["mamba_head_dim"][3], over_heads.repeat(4))
    assert [len(layer) for layer in whole["mamba_num_heads"]] == [4, 0, 0, 4]
    # the second channel is kept, by the norm over heads
    shared = nested(anatomy, ranking, keep=1).scores["mamba_num_heads"][0]
    torch.testing.assert_close(shared, torch.tensor([1.0, 2, 0, 5]))
    own = nested(anatomy, ranking, keep=1, shared=False)
    torch.testing.assert_close(own.scores["mamba_num_heads"][0], torch.tensor([3.0, 2, 4, 5]))
    assert torch.equal(own.scores["mamba_head_dim"][0], ranking.scores["mamba_head_dim"][0])
    torch.testing.assert_close(
        nested(anatomy, ranking, over="sum").scores["mamba_num_heads"][0], torch.tensor([4.0, 2, 4, 6])
    )


def test_a_shared_order_keeps_the_same_channels_of_every_head():
    model = tiny("nemotron_h")
    with in_float64():
        ranking = nested(Anatomy.of(model), random_ranking(model))
        child = prune(model, ranking, {"mamba_head_dim": 5})
    kept = ranking.order("mamba_head_dim", 0).view(-1, HEADS)
    first = sorted({int(i) % CHANNELS for i in kept[:5].flatten()})
    old, new = (m.model.layers[0].mixer.norm.weight.view(HEADS, -1) for m in (model, child))
    assert torch.equal(new, old[:, first])


def test_what_cannot_be_nested_is_a_sentence():
    llama = tiny("llama")
    with pytest.raises(NestlingError, match="llama"):
        nested(Anatomy.of(llama), random_ranking(llama))
    anatomy, ranking = toy()
    with pytest.raises(NestlingError, match="mamba_head_dim"):
        nested(anatomy, Ranking({}))
    with pytest.raises(NestlingError, match="mean"):
        nested(anatomy, ranking, over="mean")
    with pytest.raises(NestlingError, match="z, x, o"):
        rank(tiny("nemotron_h"), BATCHES, metric={"mamba_num_heads": "activation@y"})
