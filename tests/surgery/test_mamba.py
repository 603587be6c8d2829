"""Mamba-2 mixers: slices written by hand, which permutations are legal, and what a mask must and need not touch."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nestling.anatomy import Anatomy
from nestling.errors import ShapeError
from nestling.ranking import Ranking
from nestling.surgery import masked, prune
from nestling.surgery.kernels import kernel_word
from tests.models import in_float64, logits, random_ranking, tiny, token_batches
from tests.surgery.test_slices import best

IDS = token_batches(1)[0]["input_ids"]
HEADS, CHANNELS, GROUPS, STATE = 6, 9, 2, 5
INNER = HEADS * CHANNELS
CLOSE = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture(autouse=True)
def _exact():
    with in_float64():
        yield


def kept_rows(ranking: Ranking, layer: int, heads: int, channels: int, states: int) -> tuple[list, list, list]:
    """Heads, inner channels and states (of both groups) that stay, from the scores alone."""
    h = ranking.scores["mamba_num_heads"][layer]
    p = ranking.scores["mamba_head_dim"][layer]
    n = ranking.scores["ssm_state_size"][layer]
    size = HEADS // GROUPS
    kept = [g * size + i for g in range(GROUPS) for i in best(h[g * size : (g + 1) * size], heads // GROUPS)]
    inner = [i * CHANNELS + c for i in kept for c in best(p[i * CHANNELS : (i + 1) * CHANNELS], channels)]
    state = [g * STATE + i for g in range(GROUPS) for i in best(n[g * STATE : (g + 1) * STATE], states)]
    return kept, inner, state


def test_every_tensor_of_a_mixer_by_hand():
    model = tiny("nemotron_h-biases")
    ranking = random_ranking(model)
    shape = {"mamba_num_heads": 4, "mamba_head_dim": 7, "ssm_state_size": 3, "hidden_size": 36}
    old, new = model.state_dict(), prune(model, ranking, shape).state_dict()
    channels = best(ranking.scores["hidden_size"], 36)
    for layer in (0, 3):
        heads, inner, state = kept_rows(ranking, layer, 4, 7, 3)
        bc = [INNER + i for i in state] + [INNER + GROUPS * STATE + i for i in state]
        conv = inner + bc
        rows = inner + [INNER + i for i in conv] + [2 * INNER + 2 * GROUPS * STATE + i for i in heads]
        name = f"model.layers.{layer}.mixer."
        assert torch.equal(new[name + "in_proj.weight"], old[name + "in_proj.weight"][rows][:, channels])
        assert torch.equal(new[name + "in_proj.bias"], old[name + "in_proj.bias"][rows])
        assert torch.equal(new[name + "conv1d.weight"], old[name + "conv1d.weight"][conv])
        assert torch.equal(new[name + "conv1d.bias"], old[name + "conv1d.bias"][conv])
        for vector in ("A_log", "D", "dt_bias"):
            assert torch.equal(new[name + vector], old[name + vector][heads])
        assert torch.equal(new[name + "norm.weight"], old[name + "norm.weight"][inner])
        assert torch.equal(new[name + "out_proj.weight"], old[name + "out_proj.weight"][channels][:, inner])


def swap_heads(mixer, a: int, b: int) -> None:
    """Exchange two heads in every tensor of a mixer."""
    heads = list(range(HEADS))
    heads[a], heads[b] = b, a
    inner = [i * CHANNELS + c for i in heads for c in range(CHANNELS)]
    rest = list(range(INNER, INNER + 2 * GROUPS * STATE))
    rows = inner + [INNER + i for i in inner + rest] + [2 * INNER + 2 * GROUPS * STATE + i for i in heads]
    with torch.no_grad():
        mixer.in_proj.weight.copy_(mixer.in_proj.weight[rows])
        for tensor in (mixer.conv1d.weight, mixer.conv1d.bias):
            tensor.copy_(tensor[inner + rest])
        for tensor in (mixer.A_log, mixer.D, mixer.dt_bias):
            tensor.copy_(tensor[heads])
        mixer.norm.weight.copy_(mixer.norm.weight[inner])
        mixer.out_proj.weight.copy_(mixer.out_proj.weight[:, inner])


@pytest.mark.parametrize(("other", "same"), [(2, True), (3, False)])
def test_a_head_may_change_places_inside_its_group_only(other, same):
    model = tiny("nemotron_h")
    before = logits(model, IDS)
    swap_heads(model.model.layers[0].mixer, 0, other)
    assert torch.allclose(logits(model, IDS), before, **CLOSE) == same
    assert same or not torch.allclose(logits(model, IDS), before, atol=1e-3)


def test_a_cut_of_a_cut_is_the_cut():
    model = tiny("nemotron_h")
    ranking = random_ranking(model)
    middle = {"mamba_num_heads": 4, "mamba_head_dim": 7, "ssm_state_size": 4, "hidden_size": 40}
    small = {"mamba_num_heads": 2, "mamba_head_dim": 5, "ssm_state_size": 2, "hidden_size": 24}
    once = prune(model, ranking, middle)
    kept = {
        "hidden_size": torch.tensor(best(ranking.scores["hidden_size"], 40)),
        **{field: [torch.tensor([], dtype=torch.long)] * 4 for field in ("mamba_num_heads",)},
    }
    scores = dict(ranking.scores) | {"hidden_size": ranking.scores["hidden_size"][kept["hidden_size"]]}
    for field, size in (("mamba_num_heads", 4), ("mamba_head_dim", 7), ("ssm_state_size", 4)):
        layers = list(scores[field])
        for layer in (0, 3):
            heads, inner, state = kept_rows(ranking, layer, 4, 7, 4)
            layers[layer] = layers[layer][{4: heads, 7: inner}[size] if field != "ssm_state_size" else state]
        scores[field] = tuple(layers)
    twice, direct = prune(once, Ranking(scores), small), prune(model, ranking, small)
    for a, b in zip(twice.parameters(), direct.parameters(), strict=True):
        assert torch.equal(a, b)


def cut_heads(model, ranking):
    shape = {"mamba_num_heads": 4, "mamba_head_dim": 7}
    return shape, logits(prune(model, ranking, shape), IDS)


def test_a_gated_norm_left_uncorrected_would_differ(monkeypatch):
    model = tiny("nemotron_h")
    ranking = random_ranking(model)
    shape, expected = cut_heads(model, ranking)
    monkeypatch.setattr("nestling.surgery.mask._corrected", lambda module, views, kept: views)
    with masked(model, shape, ranking):
        assert not torch.allclose(logits(model, IDS), expected, atol=1e-2)


def whole_again(mixer, args) -> None:
    """Take the masks of gate and convolution away before the mixer runs."""
    for module, name in ((mixer.in_proj, "weight"), (mixer.conv1d, "weight"), (mixer.conv1d, "bias")):
        module.__dict__.pop(name, None)


def test_a_convolution_left_unmasked_with_its_gate_would_leak():
    model = tiny("nemotron_h")
    ranking = random_ranking(model)
    shape, expected = cut_heads(model, ranking)
    mixers = [model.model.layers[i].mixer for i in (0, 3)]
    with masked(model, shape, ranking):
        torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)
        for mixer in mixers:
            mixer.register_forward_pre_hook(whole_again)
        assert not torch.allclose(logits(model, IDS), expected, atol=1e-2)


def test_a_fused_norm_reads_the_corrected_weight_and_eps():
    model = tiny("nemotron_h")
    mixer, seen = model.model.layers[0].mixer, []
    eps, weight = mixer.norm.variance_epsilon, mixer.norm.weight
    hook = mixer.register_forward_hook(lambda *_: seen.append((mixer.norm.variance_epsilon, mixer.norm.weight.clone())))
    with masked(model, {"mamba_num_heads": 4}, random_ranking(model)):
        logits(model, IDS)
    hook.remove()
    assert seen[0][0] == pytest.approx(eps * 4 / 6)
    assert seen[0][1].count_nonzero() == 4 * CHANNELS
    assert mixer.norm.variance_epsilon == eps
    assert mixer.norm.weight is weight


def test_one_layer_with_attention_always_stays():
    model = tiny("nemotron_h")
    ranking = Ranking({"num_hidden_layers": torch.tensor([3.0, 2.0, 0.0, 1.0])})
    for count, kept in ((3, [0, 1, 2]), (2, [0, 2]), (1, [2])):
        child = prune(model, ranking, {"num_hidden_layers": count})
        kinds = [model.config.layers_block_type[i] for i in kept]
        assert child.config.layers_block_type == kinds


def test_heads_that_do_not_fill_their_groups_evenly_are_refused():
    model = tiny("nemotron_h")
    with pytest.raises(ShapeError, match="nearest allowed are 2 and 4"):
        prune(model, random_ranking(model), {"mamba_num_heads": 3})


def test_mamba2_refuses_an_inner_width_that_its_config_cannot_say():
    model = tiny("mamba2")
    with pytest.raises(ShapeError, match="num_heads=6"):
        prune(model, random_ranking(model), {"num_heads": 8})
    assert prune(model, random_ranking(model), {"num_heads": 6}).config.expand == 1


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        ("nemotron_h", {"mamba_num_heads": [6, 6, 6, 2], "mamba_head_dim": [9, 9, 9, 4]}),
        ("mamba2", {"num_heads": [12, 6, 12, 6]}),
        ("bamba", {"mamba_n_heads": [12, 6, 12, 6], "mamba_d_state": [3, 6, 6, 4]}),
    ],
)
def test_mixers_may_differ_from_layer_to_layer(variant, shape, tmp_path):
    model = tiny(variant)
    ranking = random_ranking(model)
    child = prune(model, ranking, shape)
    expected = logits(child, IDS)
    with masked(model, shape, ranking):
        torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)
    child.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), IDS), expected)


def test_a_layer_without_a_whole_factor_is_refused():
    with pytest.raises(ShapeError, match="layer 1 needs expand"):
        prune(tiny("mamba2"), random_ranking(tiny("mamba2")), {"num_heads": [12, 8, 12, 12]})


def test_heads_are_never_merged():
    model = tiny("nemotron_h")
    ranking, shape = random_ranking(model), {"mamba_num_heads": 4, "num_attention_heads": 4}
    plain, merged = prune(model, ranking, shape), prune(model, ranking, shape, merge="average")
    differing = [
        name
        for (name, a), b in zip(plain.named_parameters(), merged.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert differing == ["model.layers.2.mixer.q_proj.weight"]


def test_layers_lack_what_their_kind_does_not_have():
    anatomy = Anatomy.of(tiny("nemotron_h"))
    lacking = {field: [anatomy.has(axis, i) for i in range(4)] for field, axis in anatomy.axes.items()}
    assert lacking["mamba_num_heads"] == lacking["ssm_state_size"] == [True, False, False, True]
    assert lacking["intermediate_size"] == [False, True, False, False]
    assert lacking["num_attention_heads"] == [False, False, True, False]


def test_sizes_that_fused_kernels_may_refuse_get_a_word():
    """Parts of the projection that lose their alignment are named; an unaligned parent has none to lose."""
    aligned = Anatomy.of(tiny("nemotron_h", mamba_num_heads=16, mamba_head_dim=8, ssm_state_size=8))
    word = kernel_word(aligned, {"mamba_num_heads": 12, "intermediate_size": 30})
    assert word is not None
    assert word.startswith("mamba_num_heads leave 12 rows in a part of mixer.in_proj")
    assert "n_groups" not in word
    assert kernel_word(aligned, {"mamba_num_heads": 8, "intermediate_size": 30, "hidden_size": 31}) is None
    assert kernel_word(Anatomy.of(tiny("nemotron_h")), {"mamba_num_heads": 4}) is None
    with pytest.raises(ShapeError, match="mamba_num_heads"):
        kernel_word(aligned, {"mamba_num_heads": 7})
