"""Falcon-H1: Mamba-2 and attention side by side in every layer, then a gated MLP, with fixed factors on everything.

The factors of the mixer's input are one vector for all layers, made from the config, so the sizes of mixers cannot
differ between layers. The norm inside the mixer is optional, and may stand before its gate.
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
from nestling.anatomy.architectures._mamba2 import RECENT, STATE, tensors
from nestling.anatomy.architectures._mamba2 import axes as mamba_axes
from nestling.anatomy.declare import Architecture, register

register(
    Architecture(
        model_type="falcon_h1",
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
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        state={"mamba": STATE},
        recent={"mamba": RECENT},
        inner_norms=("mamba.norm",),
        per_layer_fields=(),
        alike=("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
        layer_tuples=True,
        logits_factor="lm_head_multiplier",
        derived={"mamba_d_ssm": lambda config: config.mamba_n_heads * config.mamba_d_head},
    )
)
