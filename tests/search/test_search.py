"""Candidates keep their budget, can be cut, and the best measured one is picked."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.errors import ShapeError, TargetError
from nestling.search import Budget, candidates, describe, pick, token_loss
from nestling.shape import Shape
from nestling.surgery import prune
from tests.models import logits, random_ranking, tiny, token_batches


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("llama", "0.6x"),
        ("llama-mha", "30000"),
        ("nemotron", "params=0.7x,kv_bytes=0.5x"),
        ("phi3", "flops_per_token=0.5x"),
        ("gemma3_text-tied", "0.2x"),
    ],
)
def test_every_candidate_keeps_the_budget_and_can_be_cut(variant, text):
    model, budget = tiny(variant), Budget.parse(text)
    parent, found = cost(model), candidates(Anatomy.of(model), budget)
    assert found
    for shape, price in found:
        assert price == cost(model, shape)
        assert budget.met_by(price, parent)
    assert [price.params for _, price in found] == sorted((price.params for _, price in found), reverse=True)
    ranking = random_ranking(model)
    for shape, price in (found[0], found[len(found) // 2], found[-1]):
        child = prune(model, ranking, shape)
        assert child.num_parameters() == price.params
        assert logits(child, token_batches(1)[0]["input_ids"]).isfinite().all()


def test_the_ffn_fills_what_the_others_leave():
    """No candidate could take the next size of its FFN and still keep the budget."""
    model, budget = tiny("llama"), Budget.parse("0.6x")
    anatomy, parent = Anatomy.of(model), cost(model)
    found = candidates(anatomy, budget)
    sizes = sorted({shape.get("intermediate_size", 44) for shape, _ in found} | {44})
    for shape, _ in found:
        larger = [size for size in sizes if size > shape.get("intermediate_size", 44)]
        if larger:
            assert not budget.met_by(cost(model, dict(shape) | {"intermediate_size": larger[0]}), parent)


def test_only_the_named_axes_change():
    model = tiny("llama")
    found = candidates(Anatomy.of(model), Budget.parse("0.8x"), axes=("num_hidden_layers",))
    assert found
    assert all(set(shape) == {"num_hidden_layers"} for shape, _ in found)
    with pytest.raises(ShapeError, match="'ffn' is not an axis"):
        candidates(Anatomy.of(model), Budget.parse("0.8x"), axes=("ffn",))


@pytest.mark.parametrize(
    ("text", "message"), [("2x", "not below the parent's"), ("0.001x", "no shape of this model keeps")]
)
def test_a_target_above_or_out_of_reach_is_refused(text, message):
    with pytest.raises(TargetError, match=message):
        candidates(Anatomy.of(tiny("llama")), Budget.parse(text))


def test_the_loss_is_the_cross_entropy_per_predicted_token():
    model, batches = tiny("gemma3_text-tied"), token_batches(3)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    expected = F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for chunk in (1, 7, 512):
        assert token_loss(batches, chunk)(model) == pytest.approx(expected.item(), rel=1e-5)


def test_the_best_measured_candidate_comes_first():
    model, batches = tiny("llama"), token_batches(2)
    ranking, said = random_ranking(model), []
    found = candidates(Anatomy.of(model), Budget.parse("0.6x"))
    picked = pick(model, ranking, found, batches, finalists=5, progress=lambda what, left: said.append((what, left)))
    measure = token_loss(batches)
    assert len(picked) == 5
    for candidate in picked:
        assert candidate.loss == pytest.approx(measure(prune(model, ranking, candidate.shape)), rel=1e-6)
        assert (candidate.shape, candidate.cost) in found
    assert picked[0].loss == min(candidate.loss for candidate in picked)
    assert [candidate.loss for candidate in picked] == sorted(candidate.loss for candidate in picked)
    assert picked[0].to_dict()["params"] == picked[0].cost.params
    assert describe(picked[0].shape) in [what for what, _ in said]
    left = [count for _, count in said]
    assert left[-1] == 1
    assert left == sorted(set(left), reverse=True), "each try is told with fewer that are left"


def test_the_verdict_is_the_measurement_and_not_the_expectation():
    """A builder that spoils whatever was expected to be best must change the choice."""
    model, batches = tiny("llama"), token_batches(1)
    ranking = random_ranking(model)
    found = candidates(Anatomy.of(model), Budget.parse("0.6x"))
    tried = pick(model, ranking, found, batches, finalists=4)
    expected = next(candidate for candidate in tried if len(candidate.shape) > 1)  # one axis alone is measured before

    def build(shape: Shape):
        child = prune(model, ranking, shape)
        if shape == expected.shape:
            child.get_output_embeddings().weight.data *= 100
        return child

    picked = pick(model, ranking, found, batches, finalists=4, build=build)
    assert picked[0].shape != expected.shape
    assert picked[-1].shape == expected.shape


def test_the_search_space_of_minitron_4b_has_its_eighteen_members():
    """Arithmetic of Minitron, table 9 (4B), at 4.0B plus or minus 5 %; the shape that was published is one of them."""
    parent = AutoConfig.for_model(
        "nemotron",
        vocab_size=256000,
        num_hidden_layers=32,
        hidden_size=6144,
        intermediate_size=24576,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    anatomy = Anatomy.of(parent)
    space = itertools.product((29, 30, 31, 32), (24, 32, 48), (2.5, 3, 3.5, 4), (2560, 3072, 3584, 4096, 4608))
    inside = []
    for layers, heads, expansion, hidden in space:
        shape = Shape(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=int(expansion * hidden),
            hidden_size=hidden,
        )
        try:
            price = cost(anatomy, shape)
        except ShapeError:
            continue
        if 3.8e9 <= price.params <= 4.2e9:
            inside.append(shape)
    assert len(inside) == 18
    assert Shape(num_hidden_layers=32, num_attention_heads=24, intermediate_size=9216, hidden_size=3072) in inside
