"""Conversions keep the function: dense to mixture, and to a finer mixture."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nestling.errors import NestlingError, ShapeError, UnsupportedArchitecture
from nestling.experts import use_fast_experts
from nestling.moe import mixture_config, split, upcycle
from tests.models import in_float64, logits, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "mistral", "qwen3", "granite"])
@pytest.mark.parametrize(("experts", "per_token", "granularity"), [(4, 2, 1), (4, 1, 4), (3, 2, 2), (2, 2, 11)])
def test_upcycled_logits_are_the_dense_models(variant, experts, per_token, granularity):
    dense = tiny(variant)
    mixture = upcycle(dense, experts, per_token, granularity)
    with in_float64():
        torch.testing.assert_close(logits(mixture, IDS), logits(dense, IDS), **CLOSE)


@pytest.mark.parametrize(
    ("variant", "field", "last"),
    [
        ("granite", "shared_intermediate_size", "shared_mlp.output_linear.weight"),
        ("qwen2", "shared_expert_intermediate_size", "mlp.shared_expert.down_proj.weight"),
    ],
)
@pytest.mark.parametrize(
    ("experts", "per_token", "granularity", "shared"), [(4, 2, 2, 1), (3, 1, 11, 4), (2, 2, 22, 21)]
)
def test_upcycled_logits_with_a_shared_expert_are_the_dense_models(
    variant, field, last, experts, per_token, granularity, shared
):
    dense = tiny(variant)
    mixture = upcycle(dense, experts, per_token, granularity, shared=shared)
    assert getattr(mixture.config, field) == dense.config.intermediate_size // granularity * shared
    with in_float64():
        torch.testing.assert_close(logits(mixture, IDS), logits(dense, IDS), **CLOSE)
        mixture.model.layers[0].get_parameter(last).data *= 1.1
        assert not torch.allclose(logits(mixture, IDS), logits(dense, IDS), atol=1e-4)


def test_shared_experts_where_there_can_be_none():
    with pytest.raises(UnsupportedArchitecture, match="granite"):
        upcycle(tiny("qwen3"), 4, 2, 2, shared=1)
    with pytest.raises(UnsupportedArchitecture, match="shared=1"):
        upcycle(tiny("qwen2"), 4, 2, 2)
    with pytest.raises(ShapeError, match="0 to 1"):
        upcycle(tiny("granite"), 4, 2, 2, shared=2)


def test_a_token_chooses_whole_groups():
    mixture = upcycle(tiny("qwen3", dtype=torch.float32), 4, 2, 4)
    chosen = []
    mixture.model.layers[0].mlp.experts.register_forward_hook(lambda m, args, o: chosen.append(args[1]))
    logits(mixture, IDS)
    for row in chosen[0]:
        groups, counts = (row // 4).unique(return_counts=True)
        assert (len(groups), set(counts.tolist())) == (2, {4})


def test_a_router_of_unequal_rows_would_change_the_function():
    dense = tiny("qwen3")
    mixture = upcycle(dense, 4, 1, 4)
    gate = mixture.model.layers[0].mlp.gate
    gate.weight.data += 0.1 * torch.randn_like(gate.weight)
    assert not torch.allclose(logits(mixture, IDS), logits(dense, IDS), atol=1e-3)


def test_the_papers_scaling_starts_near_and_unscaled_does_not():
    dense = tiny("qwen3", dtype=torch.float32)
    mixture = upcycle(dense, 4, 1, 4, mode="paper", router_std=1e-4)
    x = torch.randn(1, 5, 80) * 0.05  # where SiLU is all but quadratic, the cube root is exact
    wanted, found = dense.model.layers[0].mlp(x), mixture.model.layers[0].mlp(x)
    near = ((found - wanted).norm() / wanted.norm()).item()
    plain = upcycle(dense, 4, 1, 4, router_std=1e-4)
    plain.model.layers[0].mlp.gate.norm_topk_prob = False
    far = ((plain.model.layers[0].mlp(x) - wanted).norm() / wanted.norm()).item()
    assert near < 0.5 * far
    assert mixture.config.norm_topk_prob is False


def test_granularity_changes_neither_total_nor_active_experts_weights():
    from nestling.cost import cost

    dense = tiny("qwen3")
    coarse, fine = (cost(upcycle(dense, 4, 2, g)) for g in (1, 4))
    router = 80 * 4 * 4  # rows of the coarse router, all layers
    assert fine.params - coarse.params == 3 * router
    assert fine.active_params - coarse.active_params == 3 * router


def test_upcycled_checkpoints_are_stock(tmp_path):
    mixture = upcycle(tiny("llama", dtype=torch.float32), 4, 2)
    mixture.save_pretrained(tmp_path)
    loaded = use_fast_experts(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert loaded.config.model_type == "mixtral"
    torch.testing.assert_close(logits(loaded, IDS), logits(mixture, IDS))


ONE_GROUP = {"n_group": 1, "topk_group": 1}
SPLIT = [
    *(("mixtral", {}), ("qwen3_moe", {}), ("qwen3_moe-pre", {}), ("granitemoeshared", {}), ("gpt_oss", {})),
    ("nemotron_h-moe", ONE_GROUP),
    ("nemotron_h-latent", ONE_GROUP | {"norm_topk_prob": False}),
]


@pytest.mark.parametrize(("variant", "fields"), SPLIT)
def test_split_experts_compute_the_same(variant, fields):
    model = tiny(variant, **fields)
    fine = split(model, 2)
    with in_float64():
        torch.testing.assert_close(logits(fine, IDS), logits(model, IDS), **CLOSE)
    assert fine.config.num_experts_per_tok == 2 * model.config.num_experts_per_tok


@pytest.mark.parametrize(("variant", "says"), [("deepseek_v3", "as wide as"), ("nemotron_h-moe", "groups")])
def test_experts_that_cannot_be_split_are_refused(variant, says):
    with pytest.raises(UnsupportedArchitecture, match=says):
        split(tiny(variant), 2)


@pytest.mark.parametrize(
    ("variant", "numbers", "says"),
    [
        ("phi3", {}, "qwen3"),
        ("llama-biases", {}, "no place for"),
        ("llama", {"num_experts_per_tok": 9}, "take 1 to 8"),
        ("llama", {"granularity": 8}, "4, 11"),
        ("llama", {"num_experts_per_tok": 1}, "no gradient"),
        ("llama", {"mode": "paper"}, "mode exact"),
        ("llama", {"mode": "fast"}, "exact or paper"),
    ],
)
def test_what_does_not_go_is_refused(variant, numbers, says):
    with pytest.raises((NestlingError, ShapeError, UnsupportedArchitecture), match=says):
        upcycle(tiny(variant), **numbers)


def test_the_config_alone_can_be_had():
    config = mixture_config(tiny("qwen3").config, 8, 1, 4)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (32, 4, 11)
