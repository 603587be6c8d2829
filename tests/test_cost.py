"""Cost: counts against real models, against published ones, and against sums by hand."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from nestling.anatomy import Anatomy
from nestling.cost import cost, cost_by_kind
from nestling.errors import ShapeError
from nestling.shape import fit
from nestling.surgery import choose, prune
from tests.models import VARIANTS, cuts, random_ranking, tiny

LLAMA_3_1_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
NEMOTRON = {
    "vocab_size": 256000,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
MINITRON_8B = NEMOTRON | {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 48}
MINITRON_4B = NEMOTRON | {"hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24}
NEMOTRON_H = {"vocab_size": 131072, "n_groups": 8, "ssm_state_size": 128, "num_key_value_heads": 8, "head_dim": 128}
PATTERN_H = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
NEMOTRON_H_8B = NEMOTRON_H | {
    "hybrid_override_pattern": PATTERN_H,
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
}
NEMOTRON_H_4B = NEMOTRON_H_8B | {"hidden_size": 3072, "intermediate_size": 12288, "mamba_num_heads": 112}
NANO_V2_12B = NEMOTRON_H | {
    "hybrid_override_pattern": "M-M-M-M*-" * 6 + "M-M-M-M-",
    "hidden_size": 5120,
    "intermediate_size": 20480,
    "num_attention_heads": 40,
    "mamba_num_heads": 128,
    "mamba_head_dim": 80,
}
NANO_V2_9B = NANO_V2_12B | {
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "hidden_size": 4480,
    "intermediate_size": 15680,
}
PUBLISHED = {
    "Nemotron-H-8B": ("nemotron_h", NEMOTRON_H_8B, 8.10),
    "Nemotron-H-4B": ("nemotron_h", NEMOTRON_H_4B, 4.49),
    "Nemotron-Nano-v2-12B": ("nemotron_h", NANO_V2_12B, 12.31),
    "Nemotron-Nano-v2-9B": ("nemotron_h", NANO_V2_9B, 8.89),
    "Llama-3.1-8B": ("llama", LLAMA_3_1_8B, 8.03),
    "Minitron-8B": ("nemotron", MINITRON_8B, 8.27),
    "Minitron-4B": ("nemotron", MINITRON_4B, 4.19),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_come_from_the_config_alone(name):
    model_type, fields, billions = PUBLISHED[name]
    assert cost(AutoConfig.for_model(model_type, **fields)).params / 1e9 == pytest.approx(billions, abs=0.005)


def test_nemotron_h_4b_is_a_cut_of_nemotron_h_8b():
    large, small = (AutoConfig.for_model("nemotron_h", **fields) for fields in (NEMOTRON_H_8B, NEMOTRON_H_4B))
    shape = {field: NEMOTRON_H_4B[field] for field in ("hidden_size", "intermediate_size", "mamba_num_heads")}
    assert cost(large, shape) == cost(small)


def test_states_and_caches_of_a_hybrid_by_hand():
    anatomy, context, batch = Anatomy.of(AutoConfig.for_model("nemotron_h", **NEMOTRON_H_8B)), 8192, 2
    found = cost(anatomy, context=context, batch=batch, dtype=torch.bfloat16)
    inner, groups, state = 128 * 64, 8, 128
    states = 24 * (128 * 64 * 128 * 4 + (inner + 2 * groups * state) * 4 * 2)
    assert found.state_bytes == batch * states
    assert found.kv_bytes == batch * context * 4 * 2 * (8 * 128) * 2
    kinds = cost_by_kind(anatomy, fit(anatomy, {}), context, batch, torch.bfloat16)
    assert {kind: layers for kind, (layers, _) in kinds.items()} == {"mamba": 24, "mlp": 24, "attention": 4}
    assert kinds["mamba"][1].state_bytes == found.state_bytes
    assert kinds["attention"][1].kv_bytes == found.kv_bytes
    mamba = 4096 * (2 * inner + 2 * groups * state + 128) + (inner + 2 * groups * state) * 5 + 3 * 128 + inner
    assert kinds["mamba"][1].params == 24 * (mamba + inner * 4096 + 4096)
    assert kinds["mlp"][1].params == 24 * (2 * 4096 * 21504 + 4096)
    embeddings = 2 * 131072 * 4096 + 4096
    assert sum(price.params for _, price in kinds.values()) == found.params - embeddings
    more = cost(anatomy, context=2 * context, batch=batch, dtype=torch.bfloat16)
    assert (more.state_bytes, more.kv_bytes) == (found.state_bytes, 2 * found.kv_bytes)


@pytest.mark.parametrize("variant", ["nemotron_h", "mamba2", "bamba", "falcon_h1", "granitemoehybrid"])
@torch.no_grad()
def test_states_are_those_that_a_cache_holds(variant):
    model = tiny(variant, dtype=torch.bfloat16)
    cache = model(torch.ones(3, 7, dtype=torch.long), use_cache=True).cache
    held = 0
    for layer in cache.layers:
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            held += sum(tensor.numel() * tensor.element_size() for tensor in states.values())
    assert held == cost(model, batch=3, context=7).state_bytes > 0


def test_minitron_4b_is_a_cut_of_minitron_8b():
    large, small = (AutoConfig.for_model("nemotron", **fields) for fields in (MINITRON_8B, MINITRON_4B))
    shape = {field: MINITRON_4B[field] for field in ("hidden_size", "intermediate_size", "num_attention_heads")}
    assert cost(large, shape) == cost(small)


@pytest.mark.parametrize("variant", VARIANTS)
def test_params_are_those_of_the_pruned_model(variant):
    model = tiny(variant)
    ranking = random_ranking(model)
    assert cost(model).params == model.num_parameters()
    for shape in (cuts(variant)[5], cuts(variant)[6]):
        layers = choose(Anatomy.of(model), ranking, shape).form.layers
        assert cost(model, shape, layers=layers).params == prune(model, ranking, shape).num_parameters()


MODELS = {name: tiny(name) for name in ("llama-tied", "llama-biases", "qwen3", "phi3", "nemotron")}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_params_of_any_legal_shape_are_those_of_the_pruned_model(data):
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
    depth = data.draw(st.integers(1, 4))
    ffn = st.integers(1, model.config.intermediate_size)
    groups = data.draw(st.integers(1, 2))
    heads = groups * data.draw(st.integers(1, 3))
    shape = {
        "num_hidden_layers": depth,
        "intermediate_size": data.draw(ffn | st.lists(ffn, min_size=depth, max_size=depth)),
        "num_key_value_heads": groups,
        "num_attention_heads": heads,
        "hidden_size": heads * data.draw(st.integers(1, model.config.hidden_size // heads)),
    }
    shape = {field: shape[field] for field in shape if field != "hidden_size" or data.draw(st.booleans())}
    try:
        expected = prune(model, random_ranking(model), shape).num_parameters()
    except ShapeError:  # the config class may refuse; cost must then refuse too
        with pytest.raises(ShapeError):
            cost(model, shape)
        return
    assert cost(model, shape).params == expected


def test_every_figure_by_hand():
    model = tiny("llama", dtype=torch.float32)
    found = cost(model, context=10, batch=3)
    matrices = 4 * (48 * 48 + 2 * 16 * 48 + 48 * 48 + 3 * 44 * 48)
    assert found.params == found.active_params == 2 * 97 * 48 + matrices + 4 * 2 * 48 + 48
    assert found.weight_bytes == 4 * found.params
    assert (
        found.kv_bytes == 4 * (2 * 2 * 8) * 10 * 3 * 4
    )  # layers x (key and value x groups x channels) x tokens x rows
    assert found.state_bytes == 0
    assert found.flops_per_token == 2 * (matrices + 97 * 48) + 4 * 4 * 6 * 8 * 10
    assert (found.context, found.batch) == (10, 3)
    half = cost(model, context=10, batch=3, dtype=torch.bfloat16)
    assert (half.weight_bytes * 2, half.kv_bytes * 2) == (found.weight_bytes, found.kv_bytes)


def test_a_tied_matrix_is_counted_once_and_multiplied_once():
    tied, untied = (cost(tiny("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.params - tied.params == 97 * 48
    assert untied.flops_per_token == tied.flops_per_token


def test_windows_hold_no_more_than_their_length():
    bytes_of = 8  # float64
    assert cost(tiny("mistral"), context=20).kv_bytes == 4 * (2 * 2 * 12) * 6 * bytes_of
    assert cost(tiny("mistral"), context=4).kv_bytes == 4 * (2 * 2 * 12) * 4 * bytes_of
    # layers 2 and 3 of 4 have windows of 5 tokens
    model = tiny("qwen2-sliding")
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert cost(model, context=20).kv_bytes == (2 * 20 + 2 * 5) * (2 * 2 * 8) * bytes_of
    assert cost(model, {"num_hidden_layers": 3}, context=20).kv_bytes == (2 * 20 + 5) * (2 * 2 * 8) * bytes_of
    whole = cost(tiny("qwen2"), context=20)
    assert whole.kv_bytes == 4 * 20 * (2 * 2 * 8) * bytes_of


def test_groups_cut_in_one_layer_shrink_its_cache_alone():
    model = tiny("llama")
    full = cost(model, context=10).kv_bytes
    assert cost(model, {"num_key_value_heads": [1, 2, 2, 2]}, context=10).kv_bytes == full * 7 // 8
    assert cost(model, {"intermediate_size": 8, "hidden_size": 24}, context=10).kv_bytes == full


def test_a_config_and_an_anatomy_cost_what_the_model_does():
    model = tiny("gemma3_text")
    assert cost(model) == cost(Anatomy.of(model)) == cost(model.config)


def test_a_shape_that_cannot_be_cut_has_no_cost():
    with pytest.raises(ShapeError, match="larger than the parent"):
        cost(tiny("llama"), {"intermediate_size": 45})
