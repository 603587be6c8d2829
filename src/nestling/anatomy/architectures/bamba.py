"""Bamba: Mamba-2 or attention in every layer, each followed by a gated MLP; `attn_layer_indices` says which.

As in Mamba-2 itself, heads times channels must be a whole multiple of the hidden size.
"""

from nestling.anatomy.architectures._dense import (
    ATTENDS,
    ATTENTION,
    ATTENTION_BIAS,
    KV_CACHE,
    MLP,
    MLP_BIAS,
    MODEL,
    SIZES,
)
from nestling.anatomy.architectures._dense import axes as dense_axes
from nestling.anatomy.architectures._mamba2 import RECENT, STATE, expand, tensors
from nestling.anatomy.architectures._mamba2 import axes as mamba_axes
from nestling.anatomy.declare import Architecture, Config, register


def blocks(config: Config, layer: int) -> tuple[str, ...]:
    """A layer's blocks: norms, MLP, and a mixer of its kind."""
    attends = config.layers_block_type[layer] == "full_attention"
    return ("norms", "attention" if attends else "mamba", "mlp")


register(
    Architecture(
        model_type="bamba",
        axes=(
            *dense_axes("self_attn.q_proj", "feed_forward.gate_proj", "mamba.in_proj", down="feed_forward.down_proj"),
            *mamba_axes("mamba", "mamba_n_heads", "mamba_d_head", "mamba_d_state"),
        ),
        sizes=SIZES | {"g": "mamba_n_groups", "k": "mamba_d_conv"},
        tensors={name.replace(".norm.", ".final_layernorm."): spec for name, spec in MODEL.items()},
        blocks={
            "norms": {"input_layernorm.weight": "hidden", "pre_ff_layernorm.weight": "hidden"},
            "attention": ATTENTION | ATTENTION_BIAS,
            "mamba": tensors("mamba"),
            "mlp": {name.replace("mlp.", "feed_forward."): spec for name, spec in (MLP | MLP_BIAS).items()},
        },
        layer_blocks=blocks,
        layer_arguments=lambda config, layer: (config.layers_block_type[layer],),
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        state={"mamba": STATE},
        recent={"mamba": RECENT},
        inner_norms=("mamba.norm",),
        keeps=("attention",),
        per_layer_fields=(),
        layer_numbers=("attn_layer_indices",),
        layer_tuples=True,
        derived={"mamba_expand": expand("mamba_n_heads", "mamba_d_head")},
    )
)
