"""Random small models of odd sizes, cut to random shapes: against slices by name, and through disk to generation.

The slices know nothing of declarations: they read the names that dense decoders have in transformers, and the sizes of
the config. What is drawn: KV groups and heads in them, head_dim derived or given, tied or untied, every target size.
"""

import tempfile

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nestling.errors import ShapeError
from nestling.experts import use_fast_experts
from nestling.surgery import prune
from tests.models import logits, random_ranking, tiny

OWN_CHANNELS = ("q_norm", "k_norm")  # over a head's channels, which are never cut


@st.composite
def jobs(draw):
    """(variant, sizes of the model, shape to cut it to)."""
    groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    d = draw(st.sampled_from([4, 6, 8]))
    variant = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma3_text"]))
    given_dim = draw(st.booleans()) or variant == "gemma3_text"
    hidden = draw(st.integers(2, 5)) * groups * each * 2 if given_dim else groups * each * d
    sizes = {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * each,
        "hidden_size": hidden,
        "head_dim": d if given_dim else None,
        "intermediate_size": draw(st.integers(5, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "no_rope_layers": None,
        "layer_types": None,
    }
    kept_groups, kept_each = draw(st.integers(1, groups)), draw(st.integers(1, each))
    shape = {
        "num_key_value_heads": kept_groups,
        "num_attention_heads": kept_groups * kept_each,
        "hidden_size": draw(st.integers(2, hidden)),
        "intermediate_size": draw(st.integers(1, sizes["intermediate_size"])),
        "num_hidden_layers": draw(st.integers(1, sizes["num_hidden_layers"])),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(shape)), min_size=1))
    if {"num_key_value_heads", "num_attention_heads"} & chosen:
        chosen |= {"num_key_value_heads", "num_attention_heads"}
    return variant, {k: v for k, v in sizes.items() if v is not None}, {k: v for k, v in shape.items() if k in chosen}


def best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda unit: (-float(scores[unit]), unit))[:count])


def rows_of(heads, d):
    return [head * d + channel for head in heads for channel in range(d)]


def by_name(weights, config, ranking, shape, d):
    """The child's tensors, cut by what transformers calls them."""
    groups, heads = config.num_key_value_heads, config.num_attention_heads
    each = heads // groups
    kept_groups = shape.get("num_key_value_heads", groups)
    kept_each = shape.get("num_attention_heads", heads) // kept_groups
    channels = best(ranking.scores["hidden_size"], shape.get("hidden_size", config.hidden_size))
    layers = best(ranking.scores["num_hidden_layers"], shape.get("num_hidden_layers", config.num_hidden_layers))
    result = {}
    for name, tensor in weights.items():
        if ".layers." not in name:
            result[name] = tensor[..., channels]
            continue
        before, _, rest = name.partition(".layers.")
        number, _, leaf = rest.partition(".")
        layer = int(number)
        if layer not in layers:
            continue
        neurons = best(
            ranking.scores["intermediate_size"][layer], shape.get("intermediate_size", config.intermediate_size)
        )
        stay = best(ranking.scores["num_key_value_heads"][layer], kept_groups)
        score = ranking.scores["num_attention_heads"][layer]
        queries = [g * each + q for g in stay for q in best(score[g * each : (g + 1) * each], kept_each)]
        index = {"q_proj": rows_of(queries, d), "k_proj": rows_of(stay, d), "v_proj": rows_of(stay, d)}
        index |= {"gate_proj": neurons, "up_proj": neurons}
        module, kind = leaf.split(".")[-2:]
        if module in index:
            cut = tensor[index[module]] if kind == "bias" else tensor[index[module]][:, channels]
        elif module in ("o_proj", "down_proj"):
            cut = (
                tensor[channels]
                if kind == "bias"
                else tensor[channels][:, index["q_proj"] if "o_" in module else neurons]
            )
        else:
            cut = tensor if module in OWN_CHANNELS else tensor[channels]
        result[f"{before}.layers.{layers.index(layer)}.{leaf}"] = cut
    return result


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(jobs())
def test_a_random_cut_is_the_slice_by_name_and_generates_from_disk(job):
    variant, sizes, shape = job
    model = tiny(variant, dtype=torch.float32, **sizes)
    ranking = random_ranking(model, seed=sum(shape.values()))
    try:
        child = prune(model, ranking, shape)
    except ShapeError as error:
        assume("refused by the architecture's config" not in str(error))
        raise
    d = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    expected = by_name(model.state_dict(), model.config, ranking, shape, d)
    found = child.state_dict()
    assert set(found) == set(expected)
    rescaled = variant == "gemma3_text" and child.config.hidden_size != model.config.hidden_size
    for name, tensor in expected.items():
        if not rescaled or "layers" in name:  # Gemma multiplies embeddings by the root of the width, which is kept up
            assert torch.equal(found[name], tensor), name
    generates_from_disk(child)


def generates_from_disk(child):
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        child.save_pretrained(folder)
        loaded = use_fast_experts(AutoModelForCausalLM.from_pretrained(folder))
        assert torch.equal(logits(loaded, ids), logits(child, ids))
        new = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = loaded.generate(ids, use_cache=True, return_dict_in_generate=True, output_logits=True, **new)
    whole = logits(child, written.sequences)
    for step, found in enumerate(written.logits):
        torch.testing.assert_close(found, whole[:, 5 + step], atol=1e-4, rtol=1e-4)
    assert torch.equal(whole[:, 5:-1].argmax(-1), written.sequences[:, 6:])
