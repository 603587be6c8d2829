"""Mixtures made dense: the same function where weights do not depend on the token; measured weights; refusals."""

import pytest
import torch

from nestling.errors import UnsupportedArchitecture
from nestling.moe import routed_modules, to_dense
from nestling.moe.dense import mean_weights
from nestling.ranking import Ranking
from tests.models import in_float64, logits, random_ranking, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SCORES = tuple(torch.tensor([0.0, 5.0, 0.0, 0.0, 6.0, 0.0]) for _ in range(4))


def constant(variant, weight=None, **overrides):
    """A mixture whose tokens all use experts 1 and 4, evenly: with that weight, or the router's for a row of zeros."""
    model = tiny(variant, **overrides)
    for layer, router, experts in routed_modules(model):
        next(router.parameters()).data.zero_()
        gate = getattr(model.model.layers[layer].mlp if "qwen" in variant else None, "shared_expert_gate", None)
        if gate is not None:
            gate.weight.data.zero_()

        def fixed(module, args):
            return (
                args[0],
                torch.tensor([1, 4]).expand_as(args[1]),
                args[2] if weight is None else torch.full_like(args[2], weight),
            )

        experts.register_forward_pre_hook(fixed)
    return model


@pytest.mark.parametrize(
    ("variant", "field", "width"),
    [
        ("mixtral", "num_local_experts", 28),
        ("granitemoe", "num_local_experts", 28),
        ("granitemoeshared", "num_local_experts", 28 + 18),
        ("qwen2_moe", "num_experts", 28 + 11),
        ("qwen3_moe", "num_experts", 28),
    ],
)
def test_a_mixture_of_constant_weights_is_its_dense_model(variant, field, width):
    model = constant(variant, weight=0.5, **({"mlp_only_layers": []} if "qwen" in variant else {}))
    dense = to_dense(model, Ranking({field: SCORES}))
    with in_float64():
        torch.testing.assert_close(logits(dense, IDS), logits(model, IDS), **CLOSE)
    assert dense.config.intermediate_size == width
    assert "moe" not in dense.config.model_type


def test_the_weight_of_experts_that_are_not_normalized_is_measured():
    model = constant("qwen2_moe", mlp_only_layers=[], norm_topk_prob=False)
    ranking, text = Ranking({"num_experts": SCORES}), token_batches(2)
    assert mean_weights(model, text) == [(pytest.approx(2 / 6), 0.5)] * 4
    expected = logits(model, IDS)
    torch.testing.assert_close(logits(to_dense(model, ranking, batches=text), IDS), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(to_dense(model, ranking), IDS), expected, atol=1e-2)


def test_the_mean_weight_is_that_of_a_loop():
    model = tiny("qwen2_moe", mlp_only_layers=[], norm_topk_prob=False)
    seen = []
    model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 48)))
    found = mean_weights(model, token_batches(2))[2]
    block, chosen, gates = model.model.layers[2].mlp, [], []
    for hidden in torch.cat(seen):
        probabilities = (block.gate.weight @ hidden).softmax(0)
        chosen.append(sum(sorted(probabilities.tolist())[-2:]))
        gates.append((block.shared_expert_gate.weight @ hidden).sigmoid().item())
    assert found == (pytest.approx(sum(chosen) / len(chosen), rel=1e-6), pytest.approx(sum(gates) / len(gates)))


def test_biases_that_the_mixture_has_not_are_zero():
    dense = to_dense(tiny("qwen2_moe", mlp_only_layers=[], qkv_bias=False), Ranking({"num_experts": SCORES}))
    assert not dense.model.layers[1].self_attn.q_proj.bias.any()


def test_no_dense_model_is_like_one_with_dense_layers_in_between():
    for variant in ("qwen3_moe", "gpt_oss"):
        model = tiny(variant)
        with pytest.raises(UnsupportedArchitecture):
            to_dense(model, random_ranking(model))
