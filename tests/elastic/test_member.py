"""Members are views of the parent: the same numbers as a cut, in logits and gradients, in next to no memory."""

import pytest
import torch

from nestling.elastic.member import Blocks, Member, connect
from nestling.surgery import prune
from tests.elastic.toy import selected, sorted_parent
from tests.models import SHARED, VARIANTS, cuts, in_float64, logits, token_batches

IDS = token_batches(1)[0]["input_ids"]
EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in SHARED])
def test_a_member_computes_what_the_cut_model_computes(variant):
    model, ranking = sorted_parent(variant)
    for shape in cuts(variant)[-2:]:
        member, child = Member(model, selected(model, ranking, shape)), prune(model, ranking, shape)
        with in_float64():
            torch.testing.assert_close(logits(member.model, IDS), logits(child, IDS), **EXACT)
        assert member.model.num_parameters() == child.num_parameters()


@pytest.mark.parametrize("variant", ["llama", "phi3", "olmo2", "nemotron_h", "llama-tied"])
def test_gradients_reach_the_parent_and_stay_inside_the_slice(variant):
    model, ranking = sorted_parent(variant)
    shape = cuts(variant)[-1]
    selection = selected(model, ranking, shape)
    child, member = prune(model, ranking, shape), Member(model, selection)
    child(input_ids=IDS, labels=IDS).loss.backward()
    connect([member])
    member.model(input_ids=IDS, labels=IDS).loss.backward()
    place = {layer: i for i, layer in enumerate(selection.form.layers)}
    for spec in selection.anatomy.tensors.values():
        found = model.get_parameter(spec.name).grad
        if not selection.keeps(spec):
            assert found is None
            continue
        name = spec.name
        if spec.layer is not None:
            path = selection.anatomy.layer_path(spec.layer)
            name = selection.anatomy.layer_path(place[spec.layer]) + name.removeprefix(path)
        expected = torch.zeros_like(found)
        index = zip(selection.index(spec), found.shape, strict=True)
        places = [kept if kept is not None else torch.arange(size) for kept, size in index]
        expected[torch.meshgrid(*places, indexing="ij")] = child.get_parameter(name).grad
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


def test_matrices_are_views_and_change_with_the_parent():
    model, ranking = sorted_parent("llama")
    shape = {"hidden_size": 36, "intermediate_size": 30, "num_attention_heads": 4}
    member = Member(model, selected(model, ranking, shape))
    inside = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert all(p.untyped_storage().data_ptr() in inside for p in member.model.parameters())
    assert member.copied_bytes == 0
    query = member.model.model.layers[0].self_attn.q_proj
    assert isinstance(query, Blocks)
    assert len(query.blocks) == 2  # heads of two KV groups lie apart
    before = logits(member.model, IDS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(logits(member.model, IDS), logits(prune(model, ranking, shape), IDS), **EXACT)
    assert not torch.allclose(logits(member.model, IDS), before, atol=1e-3)


def test_a_member_that_keeps_other_units_is_another_model():
    model, ranking = sorted_parent("llama")
    other, _ = sorted_parent("llama", seed=1)
    shape = {"intermediate_size": 30}
    wrong = Member(other, selected(other, ranking, shape))
    assert not torch.allclose(logits(wrong.model, IDS), logits(prune(model, ranking, shape), IDS), atol=1e-2)
