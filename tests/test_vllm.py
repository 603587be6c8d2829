"""Children hold what vLLM expects of their architecture: its rules, as its model files have them, against the weights.

vLLM is not run. For each architecture it knows by name, it takes the sizes of its fused matrices from the config; the
rules below say how (read from files under `vllm/model_executor/models`, of mixed dates). What it takes must be what the
checkpoint holds.
"""

import json

import pytest
import torch
from safetensors import safe_open

from nestling import hub
from nestling.surgery import prune
from tests.models import VARIANTS, random_ranking, tiny

# Whether vLLM reads `head_dim`; otherwise it divides the hidden size by the heads.
READS_HEAD_DIM = {
    "LlamaForCausalLM": True,
    "MistralForCausalLM": True,
    "GraniteForCausalLM": True,
    "NemotronForCausalLM": True,
    "Qwen3MoeForCausalLM": True,
    "Qwen2ForCausalLM": False,
    "Qwen2MoeForCausalLM": False,
    "Olmo2ForCausalLM": False,
    "Olmo3ForCausalLM": False,
    "OlmoeForCausalLM": False,
    "GraniteMoeForCausalLM": False,
}
KNOWN = [
    "llama",
    "llama-tied",
    "llama-biases",
    "mistral",
    "granite",
    "nemotron",
    "qwen2",
    "olmo2",
    "olmo3",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "granitemoe",
]


def exported(variant, shape, folder, **overrides):
    """The config of a child, and the sizes of its tensors, as they are in its folder."""
    model = tiny(variant, dtype=torch.float32, **overrides)
    hub.save(prune(model, random_ranking(model), shape), folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    return json.loads((folder / "config.json").read_text()), sizes


def wanted(config):
    """Sizes of the tensors that vLLM loads, by its rules."""
    hidden, heads, groups = (config[f] for f in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    reads = READS_HEAD_DIM[config["architectures"][0]]
    width = (config.get("head_dim") if reads else None) or hidden // heads
    layers = {}
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        layers |= {
            f"{attention}.q_proj.weight": [heads * width, hidden],
            f"{attention}.k_proj.weight": [groups * width, hidden],
            f"{attention}.v_proj.weight": [groups * width, hidden],
            f"{attention}.o_proj.weight": [hidden, heads * width],
        }
        if "num_experts_per_tok" not in config:
            layers[f"model.layers.{layer}.mlp.down_proj.weight"] = [hidden, config["intermediate_size"]]
    return layers | {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}


def differing(config, sizes):
    return [name for name, size in wanted(config).items() if sizes.get(name) != size]


@pytest.mark.parametrize("variant", KNOWN)
def test_what_vllm_takes_from_the_config_is_what_the_weights_are(variant, tmp_path):
    shape = {"num_hidden_layers": 3} if "moe" in variant else {"num_hidden_layers": 3, "intermediate_size": 30}
    config, sizes = exported(variant, shape, tmp_path)
    assert config["architectures"][0] in READS_HEAD_DIM
    assert config["model_type"] == VARIANTS[variant][0]
    assert differing(config, sizes) == []
    assert len(config.get("layer_types") or range(3)) == config["num_hidden_layers"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert ("lm_head.weight" in sizes) != config["tie_word_embeddings"]


@pytest.mark.parametrize("variant", [name for name in KNOWN if name not in ("llama-tied", "olmoe")])
def test_a_hidden_size_of_its_own_needs_a_vllm_model_that_reads_head_dim(variant, tmp_path):
    """Six heads of 8 on 36 channels: where vLLM divides, it would look for heads of 6 and refuse the weights.

    OLMoE's own config class refuses such a child already.
    """
    overrides = {"hidden_size": 48, "head_dim": None} if VARIANTS[variant][1].get("head_dim") else {}
    config, sizes = exported(variant, {"hidden_size": 36}, tmp_path, **overrides)
    assert config["head_dim"] == 8
    assert (differing(config, sizes) == []) == READS_HEAD_DIM[config["architectures"][0]]


def test_heads_and_hidden_size_cut_in_proportion_suit_all(tmp_path):
    config, sizes = exported("olmo2", {"hidden_size": 32, "num_attention_heads": 4}, tmp_path)
    assert differing(config, sizes) == []


def test_layers_that_differ_have_a_name_that_vllm_refuses(tmp_path):
    """It would take one size for all layers, so it must not take the checkpoint for a stock one."""
    config, _ = exported("llama", {"intermediate_size": [10, 20, 30, 40]}, tmp_path)
    assert config["architectures"][0] not in READS_HEAD_DIM
    assert config["model_type"] != "llama"
