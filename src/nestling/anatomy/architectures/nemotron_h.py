"""Nemotron-H: every layer one norm and one mixer, which is Mamba-2, attention (without positions), an MLP or experts.

Nemotron-H 8B and 4B, Nemotron Nano v2 12B and 9B, Nemotron 3 Nano 30B-A3B. MLP and experts have two matrices and a
squared ReLU. Experts are in groups, of which the best are chosen first, and may work in a narrower latent.
"""

from nestling.anatomy.architectures._dense import head_dim
from nestling.anatomy.architectures._mamba2 import ALIGNED, RECENT, STATE, tensors
from nestling.anatomy.architectures._mamba2 import axes as mamba_axes
from nestling.anatomy.architectures._moe import expert_axes
from nestling.anatomy.architectures.deepseek import refuses
from nestling.anatomy.declare import Architecture, Attention, Axis, Config, Routed, register

BLOCKS = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}


def blocks(config: Config, layer: int) -> tuple[str, ...]:
    """A layer's blocks: its norm and the mixer of its kind."""
    kind = BLOCKS[config.layers_block_type[layer]]
    return ("norm", "moe", "latent" if config.moe_latent_size else "direct") if kind == "moe" else ("norm", kind)


register(
    Architecture(
        model_type="nemotron_h",
        axes=(
            Axis(
                "hidden",
                "hidden_size",
                scope="model",
                scored_at=("mixer.in_proj", "mixer.q_proj", "mixer.up_proj", "mixer.shared_experts.up_proj"),
            ),
            Axis("ffn", "intermediate_size", scored_at=("mixer.down_proj",), metric="relative"),
            Axis("kv", "num_key_value_heads", scored_at=("mixer.o_proj",)),
            Axis("q", "num_attention_heads", within=("kv",), scored_at=("mixer.o_proj",), merges=True),
            *mamba_axes("mixer", "mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
            *expert_axes("n_routed_experts", "moe_intermediate_size", at="mixer", groups=("eg",)),
            Axis(
                "shared",
                "moe_shared_expert_intermediate_size",
                scored_at=("mixer.shared_experts.down_proj",),
                metric="relative",
            ),
        ),
        sizes={
            "vocab": "vocab_size",
            "d": head_dim,
            "g": "n_groups",
            "k": "conv_kernel",
            "eg": "n_group",
            "latent": lambda config: config.moe_latent_size or 0,
        },
        tensors={
            "model.embeddings.weight": "vocab hidden",
            "model.norm_f.weight": "hidden",
            "lm_head.weight": "vocab hidden",
        },
        blocks={
            "norm": {"norm.weight": "hidden"},
            "mamba": tensors("mixer"),
            "attention": {
                "mixer.q_proj.weight": "(kv q d) hidden",
                "mixer.k_proj.weight": "(kv d) hidden",
                "mixer.v_proj.weight": "(kv d) hidden",
                "mixer.o_proj.weight": "hidden (kv q d)",
                "mixer.q_proj.bias?": "(kv q d)",
                "mixer.k_proj.bias?": "(kv d)",
                "mixer.v_proj.bias?": "(kv d)",
                "mixer.o_proj.bias?": "hidden",
            },
            "moe": {
                "mixer.gate.weight": "(eg experts) hidden",
                "mixer.gate.e_score_correction_bias": "(eg experts)",
                "mixer.shared_experts.up_proj.weight": "shared hidden",
                "mixer.shared_experts.up_proj.bias?": "shared",
                "mixer.shared_experts.down_proj.weight": "hidden shared",
                "mixer.shared_experts.down_proj.bias?": "hidden",
            },
            "direct": {
                "mixer.experts.up_proj": "(eg experts) neuron hidden",
                "mixer.experts.down_proj": "(eg experts) hidden neuron",
            },
            "latent": {
                "mixer.experts.up_proj": "(eg experts) neuron latent",
                "mixer.experts.down_proj": "(eg experts) latent neuron",
                "mixer.fc1_latent_proj.weight": "latent hidden",
                "mixer.fc1_latent_proj.bias?": "latent",
                "mixer.fc2_latent_proj.weight": "hidden latent",
                "mixer.fc2_latent_proj.bias?": "hidden",
            },
            "mlp": {
                "mixer.up_proj.weight": "ffn hidden",
                "mixer.up_proj.bias?": "ffn",
                "mixer.down_proj.weight": "hidden ffn",
                "mixer.down_proj.bias?": "hidden",
            },
        },
        layer_blocks=blocks,
        routed=Routed("mixer.gate", "mixer.experts", post="norm_topk_prob", bias="e_score_correction_bias"),
        refuses=refuses,
        kv_cache={"attention": ("kv d", "kv d")},
        attends={"attention": "kv q d"},
        attention={
            "attention": Attention("mixer", full=lambda config, layer: True, rotary=lambda config, layer: False)
        },
        state={"mamba": STATE},
        recent={"mamba": RECENT},
        inner_norms=("mixer.norm",),
        strides={"mixer.in_proj.weight": ALIGNED},
        keeps=("attention",),
        lookup="model.embeddings.weight",
        per_layer_fields=("layers_block_type",),
    )
)
