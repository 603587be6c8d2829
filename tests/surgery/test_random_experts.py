"""Random small mixtures of odd sizes, of every stock type, cut on all axes together: against slices by tensor name.

The slices know nothing of declarations: what a tensor is cut by follows from what transformers calls it. What is drawn:
experts, those of a token, groups of experts, widths, dense layers in between, shared experts, KV groups and heads, tied
or untied, the order of softmax and top-k, every target size, and sizes that differ from layer to layer.
"""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestling.cost import cost
from nestling.surgery import masked, prune
from tests.models import in_float64, logits, random_ranking, tiny, token_batches
from tests.surgery.test_random import best, generates_from_disk, rows_of

IDS = token_batches(1, seq=9)[0]["input_ids"]
QUICK = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
EXPERTS = {"mixtral": "num_local_experts", "granitemoe": "num_local_experts", "granitemoeshared": "num_local_experts"}
EXPERTS |= {"gpt_oss": "num_local_experts", "deepseek_v3": "n_routed_experts"}
SHARED = {"qwen2_moe": "shared_expert_intermediate_size", "granitemoeshared": "shared_intermediate_size"}
QWEN = ("qwen3_moe", "qwen2_moe")
VARIANTS = (*EXPERTS, *QWEN, "olmoe")


@st.composite
def routed(draw, variant):
    """Experts, those of a token and their width, and how many of them stay."""
    name = EXPERTS.get(variant, "num_experts")
    groups = draw(st.integers(1, 3)) if variant == "deepseek_v3" else 1
    each = draw(st.integers(2, 4)) if variant == "deepseek_v3" else draw(st.integers(1, 7))
    used = draw(st.integers(1, groups))
    kept = draw(st.integers(2 if variant == "deepseek_v3" else 1, each))
    per_token = draw(st.integers(1, kept * used))
    width = "moe_intermediate_size" if variant in (*QWEN, "deepseek_v3") else "intermediate_size"
    sizes = {name: groups * each, "num_experts_per_tok": per_token, width: draw(st.integers(1, 9))}
    sizes |= {"n_group": groups, "topk_group": used} if variant == "deepseek_v3" else {}
    if variant in (*QWEN, "olmoe", "deepseek_v3"):
        sizes["norm_topk_prob"] = draw(st.booleans())
    shape = {name: groups * kept}
    if variant != "deepseek_v3":
        shape[width] = draw(st.integers(1, sizes[width]))
    return sizes, shape


@st.composite
def jobs(draw, variant):
    """Sizes of the model, and the shape to cut it to."""
    sizes, shape = draw(routed(variant))
    layers = draw(st.integers(1, 3))
    kept_layers = draw(st.integers(1, layers))
    sizes |= {"num_hidden_layers": layers, "tie_word_embeddings": draw(st.booleans())}
    groups, each, d = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 6, 8]))
    kept_groups, kept_each = draw(st.integers(1, groups)), draw(st.integers(1, each))
    if variant == "deepseek_v3":
        sizes |= {"num_attention_heads": groups, "num_key_value_heads": groups, "hidden_size": draw(st.integers(3, 30))}
        sizes |= {"first_k_dense_replace": draw(st.integers(0, layers)), "intermediate_size": draw(st.integers(1, 9))}
        sizes["q_lora_rank"] = draw(st.sampled_from([None, 5]))
        shape |= {"hidden_size": draw(st.integers(2, sizes["hidden_size"]))}
    else:
        sizes |= {"num_key_value_heads": groups, "num_attention_heads": groups * each, "head_dim": d}
        sizes["hidden_size"] = groups * each * d if variant == "olmoe" else draw(st.integers(3, 30))
        shape |= {"num_key_value_heads": kept_groups, "num_attention_heads": kept_groups * kept_each}
        kept = kept_groups * kept_each * d if variant == "olmoe" else draw(st.integers(2, sizes["hidden_size"]))
        shape["hidden_size"] = kept
    if variant in QWEN:
        sizes["mlp_only_layers"] = sorted(draw(st.sets(st.integers(0, layers - 1))))
        sizes["decoder_sparse_step"] = draw(st.integers(1, 2))
        sizes["intermediate_size"] = draw(st.integers(1, 9))
    if variant in SHARED:
        sizes[SHARED[variant]] = draw(st.integers(1, 9))
    for name in {"intermediate_size", SHARED.get(variant)} & set(sizes) - set(shape):
        shape[name] = draw(st.integers(1, sizes[name]))
    if variant not in ("olmoe", "deepseek_v3") and draw(st.booleans()):
        few = max(shape[EXPERTS.get(variant, "num_experts")], sizes["num_experts_per_tok"])
        most = sizes[EXPERTS.get(variant, "num_experts")]
        each_layer = st.lists(st.integers(few, most), min_size=kept_layers, max_size=kept_layers)
        shape[EXPERTS.get(variant, "num_experts")] = draw(each_layer)
    return sizes, shape | {"num_hidden_layers": kept_layers}


class Slices:
    """Which units stay, by layer, and what that leaves of a tensor by its name."""

    def __init__(self, model, ranking, shape):
        self.config, self.scores, self.shape = model.config, ranking.scores, shape
        self.layers = best(self.scores["num_hidden_layers"], shape["num_hidden_layers"])
        self.channels = best(self.scores["hidden_size"], shape["hidden_size"])

    def size(self, name, layer):
        value = self.shape[name]
        return value[self.layers.index(layer)] if isinstance(value, list) else value

    def units(self, name, layer, groups=1):
        """The kept units of a layer, as many in each group."""
        scores, kept = self.scores[name][layer], self.size(name, layer) // groups
        each = len(scores) // groups
        return [group * each + i for group in range(groups) for i in best(scores[group * each :][:each], kept)]

    def heads(self, layer):
        """KV groups and query heads."""
        config, kept = self.config, self.units("num_key_value_heads", layer)
        each = config.num_attention_heads // config.num_key_value_heads
        many = self.size("num_attention_heads", layer) // len(kept)
        score = self.scores["num_attention_heads"][layer]
        return kept, [g * each + q for g in kept for q in best(score[g * each : (g + 1) * each], many)]

    def cut(self, layer, name, tensor):
        """A layer's tensor, by its name in the layer."""
        hidden = self.channels
        if ".experts." in name or re.search(r"\.(gate|router)\.", name):
            return self.routed(layer, name, tensor)
        if "self_attn" in name:
            return self.attention(layer, name, tensor)
        shared = next((f for f in SHARED.values() if f in self.shape), None)
        field = shared if "shared" in name else "intermediate_size"
        if "mlp" not in name:
            return tensor[hidden]
        if "shared_expert_gate" in name:
            return tensor[:, hidden]
        neurons = self.units(field, layer) if field else slice(None)
        if "input_linear" in name:
            gate, up = tensor.chunk(2)
            return torch.cat([gate[neurons], up[neurons]])[:, hidden]
        return tensor[hidden][:, neurons] if re.search("down_proj|output_linear", name) else tensor[neurons][:, hidden]

    def attention(self, layer, name, tensor):
        hidden = self.channels
        if self.config.model_type == "deepseek_v3":
            latent = "_b_proj" in name or "layernorm" in name
            return tensor if latent else tensor[hidden] if "o_proj" in name else tensor[:, hidden]
        (groups, heads), d = self.heads(layer), self.config.head_dim
        if "sinks" in name:
            return tensor[heads]
        if "_norm" in name and self.config.model_type != "olmoe":
            return tensor
        if "o_proj" in name:
            return tensor[hidden] if "bias" in name else tensor[hidden][:, rows_of(heads, d)]
        rows = rows_of(heads if ".q_" in name else groups, d)
        return tensor[rows][:, hidden] if "proj.weight" in name else tensor[rows]

    def routed(self, layer, name, tensor):
        config, hidden = self.config, self.channels
        field = next(f for f in (*EXPERTS.values(), "num_experts") if f in self.shape)
        experts = self.units(field, layer, getattr(config, "n_group", None) or 1)
        if ".experts." not in name:
            return tensor[experts][:, hidden] if name.endswith("weight") else tensor[experts]
        return torch.stack([self.expert(layer, name, tensor, expert) for expert in experts])

    def expert(self, layer, name, tensor, expert):
        hidden, matrix, count = self.channels, tensor[expert], len(tensor)
        field = "moe_intermediate_size" if "moe_intermediate_size" in self.shape else "intermediate_size"
        fused = self.config.model_type == "gpt_oss"
        if self.config.model_type == "deepseek_v3":
            neurons = list(range(self.config.moe_intermediate_size))
        else:
            scores = self.scores[field][layer].view(count, -1)[expert]
            neurons = best(scores, self.size(field, layer))
        half = len(matrix) // 2
        rows = [2 * n + i for n in neurons for i in (0, 1)] if fused else neurons + [half + n for n in neurons]
        if name.endswith("gate_up_proj"):
            return matrix[hidden][:, rows] if fused else matrix[rows][:, hidden]
        if name.endswith("down_proj"):
            return matrix[neurons][:, hidden] if fused else matrix[hidden][:, neurons]
        return matrix[rows] if "gate_up" in name else matrix[hidden]


def by_name(model, ranking, shape):
    """The child's tensors."""
    slices, result = Slices(model, ranking, shape), {}
    for name, tensor in model.state_dict().items():
        before, inside, rest = name.partition(".layers.")
        number, _, leaf = rest.partition(".")
        if not inside:
            result[name] = tensor[..., slices.channels]
        elif int(number) in slices.layers:
            new = f"{before}.layers.{slices.layers.index(int(number))}.{leaf}"
            result[new] = slices.cut(int(number), f".{leaf}", tensor)
    return result


def cuttable(shape, ranking):
    """The sizes of axes that some layer has: none may be dense, or all."""
    return {name: size for name, size in shape.items() if name in ranking.scores}


@pytest.mark.parametrize("variant", VARIANTS)
@QUICK
@given(st.data(), st.integers(0, 9))
def test_a_mixture_cut_on_all_axes_is_the_slices_by_name(variant, data, seed):
    sizes, shape = data.draw(jobs(variant))
    model = tiny(variant, seed, torch.float32, **sizes)
    ranking = random_ranking(model, seed)
    shape = cuttable(shape, ranking)
    child = prune(model, ranking, shape)
    found, expected = child.state_dict(), by_name(model, ranking, shape)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert child.num_parameters() == cost(child).params
    generates_from_disk(child)


@pytest.mark.parametrize("variant", VARIANTS)
@QUICK
@given(st.data(), st.integers(0, 9))
def test_a_mixture_masked_on_all_axes_is_the_cut_one(variant, data, seed):
    sizes, shape = data.draw(jobs(variant))
    with in_float64():
        model = tiny(variant, seed, **sizes)
        ranking = random_ranking(model, seed)
        shape = cuttable(shape, ranking)
        expected = logits(prune(model, ranking, shape), IDS)
        with masked(model, shape, ranking):
            torch.testing.assert_close(logits(model, IDS), expected, atol=1e-9, rtol=1e-9)
