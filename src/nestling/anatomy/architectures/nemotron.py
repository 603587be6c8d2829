"""Nemotron, Minitron's own architecture: squared ReLU without a gate, LayerNorm with gain 1 + weight and a bias."""

from nestling.anatomy.architectures._dense import (
    ATTENDS,
    ATTENTION,
    ATTENTION_BIAS,
    KV_CACHE,
    MODEL,
    SIZES,
    axes,
)
from nestling.anatomy.declare import Architecture, register

register(
    Architecture(
        model_type="nemotron",
        axes=axes(gate="mlp.up_proj"),
        sizes=SIZES,
        tensors=MODEL | {"model.norm.bias": "hidden"},
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS,
            "mlp": {
                "mlp.up_proj.weight": "ffn hidden",
                "mlp.up_proj.bias?": "ffn",
                "mlp.down_proj.weight": "hidden ffn",
                "mlp.down_proj.bias?": "hidden",
            },
            "norms": {
                "input_layernorm.weight": "hidden",
                "input_layernorm.bias": "hidden",
                "post_attention_layernorm.weight": "hidden",
                "post_attention_layernorm.bias": "hidden",
            },
        },
        kv_cache=KV_CACHE,
        attends=ATTENDS,
    )
)
