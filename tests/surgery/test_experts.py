"""Experts: slices by hand, masks that routers respect, shapes that leave a token too few, published counts."""

import pytest
import torch
from transformers import AutoConfig

from nestling.anatomy import Anatomy
from nestling.anatomy.routing import narrowed
from nestling.cost import cost
from nestling.errors import ShapeError
from nestling.shape import fit
from nestling.surgery import masked, prune, reorder
from nestling.surgery.kernels import kernel_word
from tests.models import in_float64, logits, random_ranking, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]


def best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i].item())[:count])


def test_qwen3_moe_by_hand():
    model = tiny("qwen3_moe")
    ranking = random_ranking(model)
    shape = {"num_experts": 4, "moe_intermediate_size": 5, "hidden_size": 36}
    old, new = model.state_dict(), prune(model, ranking, shape).state_dict()
    channels = best(ranking.scores["hidden_size"], 36)
    for i in (0, 2, 3):  # layer 1 is dense
        at = f"model.layers.{i}.mlp."
        experts = best(ranking.scores["num_experts"][i], 4)
        assert torch.equal(new[f"{at}gate.weight"], old[f"{at}gate.weight"][experts][:, channels])
        for j, expert in enumerate(experts):
            neurons = best(ranking.scores["moe_intermediate_size"][i].view(6, 14)[expert], 5)
            rows = neurons + [14 + n for n in neurons]
            up, down = old[f"{at}experts.gate_up_proj"][expert], old[f"{at}experts.down_proj"][expert]
            assert torch.equal(new[f"{at}experts.gate_up_proj"][j], up[rows][:, channels])
            assert torch.equal(new[f"{at}experts.down_proj"][j], down[channels][:, neurons])


def test_gpt_oss_interleaved_and_transposed_by_hand():
    model = tiny("gpt_oss")
    ranking = random_ranking(model)
    old = model.state_dict()
    new = prune(model, ranking, {"num_local_experts": 3, "intermediate_size": 5}).state_dict()
    at = "model.layers.2.mlp."
    experts = best(ranking.scores["num_local_experts"][2], 3)
    assert torch.equal(new[f"{at}router.bias"], old[f"{at}router.bias"][experts])
    for j, expert in enumerate(experts):
        neurons = best(ranking.scores["intermediate_size"][2].view(6, 14)[expert], 5)
        columns = [column for n in neurons for column in (2 * n, 2 * n + 1)]
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            assert torch.equal(new[f"{at}experts.{name}"][j], old[f"{at}experts.{name}"][expert][..., columns])
        assert torch.equal(new[f"{at}experts.down_proj"][j], old[f"{at}experts.down_proj"][expert][neurons])


def test_deepseek_keeps_as_many_experts_in_each_group():
    model = tiny("deepseek_v3")
    ranking = random_ranking(model)
    child = prune(model, ranking, {"n_routed_experts": 6})
    scores = ranking.scores["n_routed_experts"][2]
    kept = best(scores[:4], 3) + [4 + i for i in best(scores[4:], 3)]
    old, new = model.state_dict(), child.state_dict()
    for name in ("gate.weight", "gate.e_score_correction_bias", "experts.down_proj"):
        assert torch.equal(new[f"model.layers.2.mlp.{name}"], old[f"model.layers.2.mlp.{name}"][kept])


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_masked_expert_is_never_chosen(variant):
    model = tiny(variant)
    anatomy = Anatomy.of(model)
    axis = next(axis for axis in anatomy.axes.values() if axis.active)
    ranking, layer, chosen = random_ranking(model), anatomy.routed_layers()[-1], []
    routed = anatomy.architecture.routed
    experts = model.get_submodule(f"{anatomy.layer_path(layer)}.{routed.experts}")
    experts.register_forward_hook(lambda module, args, output: chosen.append(args[1]))
    kept = set(best(ranking.scores[axis.field][layer], 4)) if not axis.within else None
    logits(model, IDS)
    with masked(model, {axis.field: 4}, ranking):
        logits(model, IDS)
    if kept is not None:
        assert set(chosen[1].unique().tolist()) <= kept
        assert not set(chosen[0].unique().tolist()) <= kept
    assert len(chosen[1].unique()) <= 4


def test_zero_rows_instead_would_be_chosen():
    """The negative control: a router row of zeros still wins over negative logits."""
    router = tiny("qwen3_moe").model.layers[0].mlp.gate
    hidden = torch.randn(50, 48, dtype=torch.float64)
    _, _, right = narrowed(router, torch.tensor([0, 2, 3]))(hidden)
    router.weight.data[[1, 4, 5]] = 0
    assert set(right.unique().tolist()) == {0, 2, 3}
    assert set(router(hidden)[2].unique().tolist()) > {0, 2, 3}


def test_moving_experts_without_their_router_rows_would_change_the_function():
    model = tiny("mixtral")
    with in_float64():
        before = logits(model, IDS)
        reorder(model, random_ranking(model))
        torch.testing.assert_close(logits(model, IDS), before, rtol=1e-9, atol=1e-9)
        model.model.layers[0].mlp.gate.weight.data = model.model.layers[0].mlp.gate.weight.data.roll(1, 0)
        assert not torch.allclose(logits(model, IDS), before, atol=1e-3)


@pytest.mark.parametrize(
    ("variant", "shape", "near"),
    [
        ("qwen3_moe", {"num_experts": 1}, "num_experts=2"),
        ("mixtral", {"num_local_experts": [6, 1, 4, 4]}, "num_experts_per_tok=2"),
        ("deepseek_v3", {"n_routed_experts": 2}, "n_routed_experts=4"),
        ("olmoe", {"hidden_size": 40}, "cut both alike"),
    ],
)
def test_too_few_experts_and_torn_sizes_are_refused(variant, shape, near):
    with pytest.raises(ShapeError, match=near):
        fit(Anatomy.of(tiny(variant)), shape)


def test_dense_layers_follow_the_kept_ones():
    for variant in ("qwen3_moe", "qwen3_moe-pre"):
        model = tiny(variant)
        anatomy, ranking = Anatomy.of(model), random_ranking(model)
        child = prune(model, ranking, {"num_hidden_layers": 3})
        kept = sorted(ranking["num_hidden_layers"][:3].tolist())
        dense = [new for new, old in enumerate(kept) if "mlp" in anatomy.blocks(old)]
        assert (child.config.mlp_only_layers, child.config.decoder_sparse_step) == (dense, 1)


PUBLISHED = {
    "mixtral": ({}, 46.7, 12.9),
    "qwen3_moe": (
        {"num_hidden_layers": 48, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 4},
        30.5,
        3.3,
    ),
    "qwen2_moe": ({}, 14.3, 2.7),
    "olmoe": ({"intermediate_size": 1024}, 6.9, 1.3),
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_counts(model_type):
    """Mixtral 8x7B, Qwen3-30B-A3B, Qwen1.5-MoE-A2.7B, OLMoE-1B-7B: billions of parameters, all and active."""
    fields, total, active = PUBLISHED[model_type]
    found = cost(AutoConfig.for_model(model_type, **fields))
    assert abs(found.params / 1e9 - total) < 0.06
    assert abs(found.active_params / 1e9 - active) < 0.06


def test_a_word_about_widths_that_grouped_products_refuse():
    anatomy = Anatomy.of(tiny("qwen3_moe", moe_intermediate_size=16))
    word = kernel_word(anatomy, {"moe_intermediate_size": 10})
    assert word is not None
    assert "moe_intermediate_size leaves experts 10 wide" in word
    assert "eager" in word
    assert kernel_word(anatomy, {"moe_intermediate_size": 8, "num_experts": 5, "intermediate_size": 30}) is None
    assert kernel_word(Anatomy.of(tiny("qwen3_moe", moe_intermediate_size=14)), {"moe_intermediate_size": 10}) is None
    assert kernel_word(Anatomy.of(tiny("llama")), {"intermediate_size": 30}) is None
