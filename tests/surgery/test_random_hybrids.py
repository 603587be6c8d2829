"""Random small hybrids of odd sizes, any number of groups and order of layers, cut to random shapes: masked is cut."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.errors import ShapeError
from nestling.surgery import masked, prune, reorder
from nestling.surgery.choose import kept_layers
from tests.models import in_float64, logits, random_ranking, tiny, token_batches

IDS = token_batches(1, seq=9)[0]["input_ids"]
CLOSE = {"atol": 1e-9, "rtol": 1e-9}
QUICK = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def attention(draw):
    """KV heads, query heads of each, and how many of both stay."""
    kv, q = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kept = draw(st.integers(1, kv))
    return (
        {"num_key_value_heads": kv, "num_attention_heads": kv * q},
        {"num_key_value_heads": kept, "num_attention_heads": kept * draw(st.integers(1, q))},
    )


@st.composite
def nemotron(draw):
    """Sizes and a shape: every axis of a mixer, of attention and MLP, the hidden size, and layers of any order."""
    groups, heads, channels, state = (draw(st.integers(1, most)) for most in (3, 4, 5, 5))
    kinds = draw(st.lists(st.sampled_from(["linear_attention", "mlp", "full_attention"]), min_size=2, max_size=4))
    assume("full_attention" in kinds and "linear_attention" in kinds)
    of_attention, kept_attention = draw(attention())
    sizes = {
        "layers_block_type": kinds,
        "num_hidden_layers": len(kinds),
        "hidden_size": draw(st.integers(6, 20)),
        "head_dim": draw(st.sampled_from([4, 6])),
        "intermediate_size": draw(st.integers(3, 15)),
        "n_groups": groups,
        "mamba_num_heads": groups * heads,
        "mamba_head_dim": channels,
        "ssm_state_size": state,
        "chunk_size": draw(st.integers(1, 6)),
    } | of_attention
    shape = {
        "hidden_size": draw(st.integers(3, sizes["hidden_size"])),
        "intermediate_size": draw(st.integers(1, sizes["intermediate_size"])),
        "mamba_num_heads": groups * draw(st.integers(1, heads)),
        "mamba_head_dim": draw(st.integers(1, channels)),
        "ssm_state_size": draw(st.integers(1, state)),
        "num_hidden_layers": draw(st.integers(1, len(kinds))),
    } | kept_attention
    if "mlp" not in kinds:
        del shape["intermediate_size"]
    return "nemotron_h", sizes, shape


@st.composite
def zamba(draw):
    """Sizes and a shape: shared blocks in one to three sets, used by any layers."""
    kinds = draw(st.lists(st.sampled_from(["linear_attention", "hybrid"]), min_size=2, max_size=5))
    assume("hybrid" in kinds)
    groups, each, expand = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    of_attention, kept_attention = draw(attention())
    heads, hidden = groups * each, 4 * groups * each * draw(st.integers(1, 2))
    sizes = {
        "layers_block_type": kinds,
        "num_hidden_layers": len(kinds),
        "num_mem_blocks": draw(st.integers(1, 3)),
        "hidden_size": hidden,
        "attention_head_dim": 6,
        "intermediate_size": draw(st.integers(3, 15)),
        "mamba_ngroups": groups,
        "n_mamba_heads": heads,
        "mamba_headdim": expand * hidden // heads,
        "mamba_expand": expand,
        "mamba_d_state": draw(st.integers(1, 5)),
        "adapter_rank": draw(st.integers(1, 4)),
        "chunk_size": draw(st.integers(1, 6)),
        "use_mem_rope": draw(st.booleans()),
    } | of_attention
    shape = {
        "intermediate_size": draw(st.integers(1, sizes["intermediate_size"])),
        "mamba_d_state": draw(st.integers(1, sizes["mamba_d_state"])),
        "num_hidden_layers": draw(st.integers(1, len(kinds))),
    } | kept_attention
    return "zamba2-two", sizes | {"tie_word_embeddings": True}, shape


@QUICK
@given(st.one_of(nemotron(), zamba()), st.integers(0, 9))
def test_any_hybrid_masked_is_the_cut_one(job, seed):
    variant, sizes, shape = job
    with in_float64():
        model = tiny(variant, seed, **sizes)
        ranking = random_ranking(model, seed)
        try:
            child = prune(model, ranking, shape)
        except ShapeError:
            assume(False)
        whole, expected = logits(model, IDS), logits(child, IDS)
        with masked(model, shape, ranking):
            torch.testing.assert_close(logits(model, IDS), expected, **CLOSE)
        layers = kept_layers(Anatomy.of(model), ranking, shape["num_hidden_layers"])
        assert child.num_parameters() == cost(model, shape, layers=layers).params
        reorder(model, ranking)
        torch.testing.assert_close(logits(model, IDS), whole, **CLOSE)
