"""Nemotron-H: every layer one norm and one mixer, which is Mamba-2, attention (without positions) or an MLP.

Nemotron-H 8B and 4B, Nemotron Nano v2 12B and 9B. The MLP has two matrices and a squared ReLU.
"""

from nestling.anatomy.architectures._dense import head_dim
from nestling.anatomy.architectures._mamba2 import RECENT, STATE, tensors
from nestling.anatomy.architectures._mamba2 import axes as mamba_axes
from nestling.anatomy.declare import Architecture, Attention, Axis, Config, register

BLOCKS = {"linear_attention": "mamba", "full_attention": "attention", "mlp": "mlp"}


def blocks(config: Config, layer: int) -> tuple[str, ...]:
    """A layer's blocks: its norm and the mixer of its kind (none for a kind that is not declared)."""
    kind = config.layers_block_type[layer]
    return ("norm", BLOCKS[kind]) if kind in BLOCKS else ("norm",)


register(
    Architecture(
        model_type="nemotron_h",
        axes=(
            Axis(
                "hidden",
                "hidden_size",
                scope="model",
                scored_at=("mixer.in_proj", "mixer.q_proj", "mixer.up_proj"),
            ),
            Axis("ffn", "intermediate_size", scored_at=("mixer.down_proj",), metric="relative"),
            Axis("kv", "num_key_value_heads", scored_at=("mixer.o_proj",)),
            Axis("q", "num_attention_heads", within=("kv",), scored_at=("mixer.o_proj",), merges=True),
            *mamba_axes("mixer", "mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
        ),
        sizes={"vocab": "vocab_size", "d": head_dim, "g": "n_groups", "k": "conv_kernel"},
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
            "mlp": {
                "mixer.up_proj.weight": "ffn hidden",
                "mixer.up_proj.bias?": "ffn",
                "mixer.down_proj.weight": "hidden ffn",
                "mixer.down_proj.bias?": "hidden",
            },
        },
        layer_blocks=blocks,
        kv_cache={"attention": ("kv d", "kv d")},
        attends={"attention": "kv q d"},
        attention={
            "attention": Attention("mixer", full=lambda config, layer: True, rotary=lambda config, layer: False)
        },
        state={"mamba": STATE},
        recent={"mamba": RECENT},
        inner_norms=("mixer.norm",),
        keeps=("attention",),
        lookup="model.embeddings.weight",
        per_layer_fields=("layers_block_type",),
    )
)
