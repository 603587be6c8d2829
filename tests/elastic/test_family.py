"""A family: members beside their extracted checkpoints, on disk and back, between trained budgets, over one cache."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from nestling.elastic import Entry, Family
from nestling.errors import CheckpointError, ShapeError, TargetError
from nestling.shape import Shape
from tests.elastic.toy import sorted_parent
from tests.models import in_float64, logits, token_batches

IDS = token_batches(1, batch=1, seq=10)[0]["input_ids"]
HALF = Shape(hidden_size=36, intermediate_size=[20, 30, 12], num_hidden_layers=3, num_key_value_heads=1)
WIDE = Shape(intermediate_size=30)
EXACT = {"atol": 1e-10, "rtol": 1e-10}


def family(variant: str = "llama", half: Shape = HALF, **overrides) -> Family:
    model, ranking = sorted_parent(variant, **overrides)
    order = ranking.order("num_hidden_layers").tolist()
    return Family(model, {"0.8x": Entry(WIDE), "0.5x": Entry(half)}, order, {"errors": {}})


def test_members_are_their_extracted_checkpoints():
    found = family()
    assert list(found) == ["1x", "0.8x", "0.5x"]
    pairs = [(found[name], found.extract(name)) for name in found]
    with in_float64():
        for member, extracted in pairs:
            torch.testing.assert_close(logits(member, IDS), logits(extracted, IDS), **EXACT)
    assert found["1x"] is found.parent
    assert found.cost("0.5x").params == found.extract("0.5x").num_parameters()
    assert not torch.allclose(logits(found["0.5x"], IDS), logits(found["1x"], IDS), atol=1e-2)


def test_on_disk_it_is_the_parents_checkpoint(tmp_path):
    found = family()
    found.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    assert (again.entries, again.order) == (found.entries, found.order)
    for name in found:
        assert torch.equal(logits(again[name], IDS), logits(found[name], IDS))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "family", dtype=torch.float64)
    assert torch.equal(logits(plain, IDS), logits(found.parent, IDS))
    with pytest.raises(CheckpointError, match="holds no family"):
        Family.load(tmp_path / "nothing")
    record = json.loads((tmp_path / "family/family.json").read_text())
    (tmp_path / "family/family.json").write_text(json.dumps(record | {"order": [0, 1]}))
    with pytest.raises(CheckpointError, match="not of this model"):
        Family.load(tmp_path / "family")
    (tmp_path / "family/family.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        Family.load(tmp_path / "family")


def test_a_budget_between_members_lies_between_them():
    found = family("qwen3", Shape(hidden_size=48, intermediate_size=20, num_attention_heads=4))
    whole = found.cost("1x").params
    for name in ("0.85x", "0.7x"):
        entry = found.entry(name)
        assert not entry.trained
        assert found.cost(name).params / whole == pytest.approx(float(name[:-1]), rel=0.01)
        assert 48 <= entry.shape["hidden_size"] <= 80
        assert 20 <= entry.shape["intermediate_size"] <= 44
    with pytest.raises(TargetError, match="below the smallest member"):
        found.entry("0.1x")
    with pytest.raises(TargetError, match="not a target"):
        found["huge"]


def test_a_member_goes_on_with_the_cache_of_another():
    """Units and layers that only the larger one has are dead here, so both compute the same, and so must the two."""
    found = family("llama", Shape(intermediate_size=30, num_hidden_layers=3, num_key_value_heads=1))
    selection = found.selection("0.5x")
    with torch.no_grad():
        for spec in selection.anatomy.tensors.values():
            if spec.layer is None or not spec.name.endswith(("o_proj.weight", "down_proj.weight")):
                continue
            tensor = found.parent.get_parameter(spec.name)
            kept = selection.index(spec)[-1] if selection.keeps(spec) else torch.arange(0)
            dead = torch.ones(tensor.shape[-1], dtype=torch.bool)
            dead[kept] = False
            tensor[:, dead] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    alone = found.generate(IDS, "0.5x", **options)
    mixed = found.generate(IDS, "0.5x", prefill="1x", **options)
    assert torch.equal(alone.sequences, mixed.sequences)
    torch.testing.assert_close(torch.stack(mixed.scores), torch.stack(alone.scores), atol=1e-6, rtol=1e-6)
    with pytest.raises(ShapeError, match=r"was not cached|KV groups in the cache"):
        found.generate(IDS, "1x", prefill="0.5x", **options)


def test_small_for_prefill_and_large_for_decoding_where_caches_agree():
    found = family()  # 0.8x differs in neurons only
    options = {"max_new_tokens": 4, "do_sample": False}
    assert found.generate(IDS, "1x", prefill="0.8x", **options).shape == (1, 14)


def test_a_state_that_changes_its_size_is_not_handed_over():
    model, ranking = sorted_parent("nemotron_h")
    order = ranking.order("num_hidden_layers").tolist()
    found = Family(model, {"0.9x": Entry(Shape(intermediate_size=30)), "0.5x": Entry(Shape(mamba_num_heads=4))}, order)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert found.generate(IDS, "0.9x", prefill="1x", **options).shape == (1, 14)
    assert torch.equal(found.generate(IDS, "1x", prefill="1x", **options), found.generate(IDS, "1x", **options))
    with pytest.raises(ShapeError, match="keeps a state"):
        found.generate(IDS, "0.5x", prefill="1x", **options)
