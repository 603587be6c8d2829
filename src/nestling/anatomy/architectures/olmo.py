"""OLMo 2 and 3: norms only after each block, and norms over the queries and keys of all heads together."""

from nestling.anatomy.architectures._dense import (
    ATTENDS,
    ATTENTION,
    ATTENTION_BIAS,
    KV_CACHE,
    MLP,
    MODEL,
    SIZES,
    axes,
)
from nestling.anatomy.declare import Architecture, register

BLOCKS = {
    "attention": ATTENTION
    | ATTENTION_BIAS
    | {
        "self_attn.q_norm.weight": "(kv q d)",
        "self_attn.k_norm.weight": "(kv d)",
    },
    "mlp": MLP,
    "norms": {
        "post_attention_layernorm.weight": "hidden",
        "post_feedforward_layernorm.weight": "hidden",
    },
}

for _model_type in ("olmo2", "olmo3"):
    register(
        Architecture(
            model_type=_model_type,
            axes=axes(),
            sizes=SIZES,
            tensors=MODEL,
            blocks=BLOCKS,
            kv_cache=KV_CACHE,
            attends=ATTENDS,
        )
    )
