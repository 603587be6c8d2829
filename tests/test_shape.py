"""Shapes: what is completed, and that every refusal names the thing, its value and the way out."""

import re

import pytest

from nestling.anatomy import Anatomy
from nestling.errors import ShapeError
from nestling.shape import Shape, child_config, fit
from tests.models import tiny


@pytest.fixture(scope="module")
def llama():
    return Anatomy.of(tiny("llama"))


REFUSALS = {
    "unknown field": ({"ffn": 3}, "'ffn' is not an axis of this model: choose from hidden_size, intermediate_size"),
    "too large": ({"intermediate_size": 45}, "intermediate_size=45 is larger than the parent's 44 in layer 0"),
    "too large in one layer": (
        {"intermediate_size": [4, 4, 50, 4]},
        "intermediate_size=50 is larger than the parent's 44 in layer 2",
    ),
    "too deep": ({"num_hidden_layers": 5}, "num_hidden_layers=5 cannot be cut from 4 layers"),
    "depth per layer": ({"num_hidden_layers": [1, 1]}, "give one number"),
    "torn groups": (
        {"num_attention_heads": 5},
        "the 2 groups (kv) the same number of units, at most 3: nearest allowed are 4 and 6",
    ),
    "too many heads in a group": (
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        "num_attention_heads=4 does not give each of the 1 groups (kv)",
    ),
    "too short a list": ({"intermediate_size": [4, 4]}, "has 2 values but the target has 4 layers"),
    "too long for the depth": (
        {"intermediate_size": [4, 4, 4, 4], "num_hidden_layers": 3},
        "has 4 values but the target has 3 layers: give one value per kept layer",
    ),
    "the stream per layer": (
        {"hidden_size": [48, 36, 36, 36]},
        "hidden_size runs through the whole model: give one number",
    ),
    "refused by the config": (
        {"hidden_size": 40},
        "hidden_size=40 is refused by the architecture's config",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_cut_is_refused(llama, case):
    shape, message = REFUSALS[case]
    with pytest.raises(ShapeError, match=re.escape(message)) as refusal:
        fit(llama, shape)
    assert "\n" not in str(refusal.value)


def test_a_refusal_of_the_config_names_the_nearest_sizes(llama):
    with pytest.raises(ShapeError, match=r"nearest allowed: hidden_size=36 or hidden_size=42$"):
        fit(llama, {"hidden_size": 40})
    for size in (36, 42):
        assert fit(llama, {"hidden_size": size}).sizes[0]["hidden"] == size


def test_named_layers_must_agree_with_their_number(llama):
    with pytest.raises(ShapeError, match="num_hidden_layers=3 but 2 layers were named"):
        fit(llama, {"num_hidden_layers": 3}, layers=[0, 2])
    assert fit(llama, {}, layers=[3, 1]).layers == (1, 3)


def test_an_empty_shape_is_the_parent(llama):
    form = fit(llama, {})
    assert form.layers == (0, 1, 2, 3)
    assert list(form.sizes) == [llama.sizes(layer) for layer in range(4)]
    assert child_config(llama, form).to_dict() == llama.config.to_dict()


def test_kv_groups_take_their_query_heads_along(llama):
    assert fit(llama, {"num_key_value_heads": 1}).values["num_attention_heads"] == (3, 3, 3, 3)
    assert fit(llama, {"num_key_value_heads": [2, 1, 1, 2]}).values["num_attention_heads"] == (6, 3, 3, 6)
    assert fit(llama, {"num_attention_heads": 2}).values["num_key_value_heads"] == (2, 2, 2, 2)


def test_lone_heads_take_their_groups_along():
    anatomy = Anatomy.of(tiny("llama-mha"))
    for field in ("num_attention_heads", "num_key_value_heads"):
        form = fit(anatomy, {field: 3})
        assert form.values["num_attention_heads"] == form.values["num_key_value_heads"] == (3, 3, 3, 3)
        assert child_config(anatomy, form).num_key_value_heads == 3


def test_the_head_size_does_not_follow_the_cut(llama):
    config = child_config(llama, fit(llama, {"hidden_size": 36, "num_attention_heads": 4}))
    assert (config.head_dim, config.hidden_size, config.num_attention_heads) == (8, 36, 4)


@pytest.mark.parametrize("variant", ["qwen2-sliding", "smollm3", "olmo3"])
def test_what_the_config_holds_per_layer_follows_the_layers(variant):
    anatomy = Anatomy.of(tiny(variant))
    config = child_config(anatomy, fit(anatomy, {}, layers=[1, 3]))
    assert config.num_hidden_layers == 2
    assert config.layer_types == [anatomy.config.layer_types[layer] for layer in (1, 3)]


# ---- writing shapes down


def test_a_shape_is_a_mapping_that_is_equal_however_it_was_written():
    one, other = (
        Shape(num_hidden_layers=3, intermediate_size=[4, 5, 6]),
        Shape(intermediate_size=(4, 5, 6), num_hidden_layers=3),
    )
    assert one == other
    assert hash(one) == hash(other)
    assert dict(one) == {"intermediate_size": (4, 5, 6), "num_hidden_layers": 3}
    assert one != Shape(num_hidden_layers=3)


def test_shapes_are_read_and_kept(tmp_path):
    shape = Shape.parse("intermediate_size=1152, num_hidden_layers=26")
    assert shape == {"intermediate_size": 1152, "num_hidden_layers": 26}
    mixed = Shape(intermediate_size=[4, 5], hidden_size=8)
    mixed.save(tmp_path / "shape.json")
    assert Shape.parse(str(tmp_path / "shape.json")) == mixed


@pytest.mark.parametrize(
    "text", ["intermediate_size", "intermediate_size=", "intermediate_size=big", "hidden_size=-4", "a=1.5"]
)
def test_text_that_is_no_shape_is_refused(text):
    with pytest.raises(ShapeError, match="is not a size: write FIELD=NUMBER"):
        Shape.parse(text)
