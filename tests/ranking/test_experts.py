"""Scores of experts and their neurons against loops over tokens; removal against a model really cut."""

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.ranking import rank
from nestling.ranking.experts import removal_errors
from nestling.surgery import prune
from tests.models import MOE, in_float64, logits, random_ranking, tiny, token_batches

BATCHES = token_batches(2, 2, 9)


def calls(model, batches):
    """What the first experts' module is called with and returns, batch by batch."""
    anatomy, found = Anatomy.of(model), []
    routed = anatomy.architecture.routed
    layer = anatomy.routed_layers()[0]
    module = model.get_submodule(f"{anatomy.layer_path(layer)}.{routed.experts}")
    hook = module.register_forward_hook(lambda m, a, o: found.append((*a, o)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return layer, module, found


def neurons(module, expert, x):
    gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
    return torch.nn.functional.silu(gate) * up


def slots(found, expert):
    for hidden, index, weights, output in found:
        for token in range(len(hidden)):
            for slot in range(index.shape[1]):
                if index[token, slot] == expert:
                    yield hidden[token], weights[token, slot], output[token]


@pytest.mark.parametrize("metric", ["reap", "frequency", "gate", "contribution"])
def test_scores_of_experts_are_those_of_a_loop(metric):
    model = tiny("qwen3_moe")
    with in_float64():
        ranking = rank(model, BATCHES, metric={"num_experts": metric})
        layer, module, found = calls(model, BATCHES)
    tokens = sum(len(hidden) for hidden, *_ in found)
    for expert in range(6):
        values = {"reap": [], "frequency": [], "gate": [], "contribution": []}
        for x, weight, output in slots(found, expert):
            wrote = (weight * module.down_proj[expert] @ neurons(module, expert, x)).norm()
            values["reap"].append(wrote)
            values["frequency"].append(torch.ones(()))
            values["gate"].append(weight)
            values["contribution"].append((wrote / output.norm()) ** 2)
        total = torch.stack(values[metric]).sum().double().detach() if values[metric] else torch.zeros(()).double()
        count = {"reap": len(values["reap"]), "gate": len(values["gate"]), "frequency": tokens}.get(metric, 1)
        expected = total / max(1, count)
        expected = expected.sqrt() if metric == "contribution" else expected
        torch.testing.assert_close(ranking.scores["num_experts"][layer][expert], expected, rtol=1e-6, atol=1e-9)


def test_scores_of_neurons_are_those_of_a_loop():
    model = tiny("qwen3_moe")
    with in_float64():
        ranking = rank(model, BATCHES, metric={"moe_intermediate_size": "contribution"})
        layer, module, found = calls(model, BATCHES)
    expected = torch.zeros(6, 14, dtype=torch.float64)
    for expert in range(6):
        for x, weight, output in slots(found, expert):
            size = neurons(module, expert, x).abs() * module.down_proj[expert].norm(dim=0) * weight / output.norm()
            expected[expert] += size.detach() ** 2
    found_scores = ranking.scores["moe_intermediate_size"][layer].view(6, 14)
    torch.testing.assert_close(found_scores, expected.sqrt(), rtol=1e-6, atol=1e-9)


def test_padding_does_not_count():
    model, ids = tiny("qwen3_moe"), BATCHES[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    padded = rank(model, [{"input_ids": ids, "attention_mask": mask}], metric={"num_experts": "reap"})
    apart = rank(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :5]}], metric={"num_experts": "reap"})
    for layer in Anatomy.of(model).routed_layers():
        torch.testing.assert_close(
            padded.scores["num_experts"][layer], apart.scores["num_experts"][layer], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("variant", ["qwen3_moe", "qwen3_moe-pre", "deepseek_v3", "gpt_oss"])
def test_removal_is_what_a_cut_model_shows(variant):
    """The block's output without an expert, from a model that lacks it in that layer."""
    model = tiny(variant)
    with in_float64():
        errors = removal_errors(model, BATCHES[:1])
        anatomy = Anatomy.of(model)
        layer, _, found = calls(model, BATCHES[:1])
        expert, field = 3, next(axis.field for axis in anatomy.axes.values() if axis.active)
        output = found[0][-1]
        if variant == "deepseek_v3":  # groups cannot differ in size: the router's own bias removes the expert
            gate = model.get_submodule(f"{anatomy.layer_path(layer)}.mlp.gate")
            gate.e_score_correction_bias[expert] = -torch.inf
            without = calls(model, BATCHES[:1])[2][0][-1]
        else:
            ranking = random_ranking(model)
            ranking.scores[field][layer][expert] = -1
            sizes = [anatomy.value(anatomy.axis(field), i) - (i == layer) for i in range(anatomy.num_layers)]
            without = calls(prune(model, ranking, {field: sizes}), BATCHES[:1])[2][0][-1]
    expected = ((without - output).square().sum(-1) / output.square().sum(-1)).mean()
    torch.testing.assert_close(errors[layer][expert].double(), expected.double(), rtol=1e-4, atol=1e-8)


def test_an_expert_without_use_is_the_first_to_go():
    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data[2] = 0
    for metric in ("reap", "contribution"):
        ranking = rank(model, BATCHES, metric={"num_local_experts": metric})
        assert all(scores.argmin() == 2 for scores in ranking.scores["num_local_experts"])


def test_an_expert_that_no_token_chooses_can_go_without_change():
    model, ids = tiny("gpt_oss"), BATCHES[0]["input_ids"]
    for layer in model.model.layers:
        layer.mlp.router.bias.data[4] = -100
    before = logits(model, ids)
    ranking = rank(model, BATCHES, metric={"num_local_experts": "frequency"})
    assert all(scores[4] == 0 for scores in ranking.scores["num_local_experts"])
    torch.testing.assert_close(logits(prune(model, ranking, {"num_local_experts": 5}), ids), before)


@pytest.mark.parametrize("variant", MOE)
def test_every_axis_of_every_variant_is_scored(variant):
    model = tiny(variant, dtype=torch.float32)
    ranking = rank(model, BATCHES[:1])
    assert set(ranking.scores) == {*Anatomy.of(model).fields}
    child = prune(model, ranking, {"num_hidden_layers": 3})
    assert torch.isfinite(logits(child, BATCHES[0]["input_ids"])).all()
