"""Phi-3: query, key and value in one matrix, gate and up in another."""

from nestling.anatomy.architectures._dense import ATTENDS, KV_CACHE, MODEL, PRE_NORMS, SIZES, axes
from nestling.anatomy.declare import Architecture, Attention, register

register(
    Architecture(
        model_type="phi3",
        axes=axes(query="self_attn.qkv_proj", gate="mlp.gate_up_proj"),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": {
                "self_attn.qkv_proj.weight": "(kv q d + kv d + kv d) hidden",
                "self_attn.o_proj.weight": "hidden (kv q d)",
            },
            "mlp": {
                "mlp.gate_up_proj.weight": "(ffn + ffn) hidden",
                "mlp.down_proj.weight": "hidden ffn",
            },
            "norms": PRE_NORMS,
        },
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        attention={"attention": Attention(query=("qkv_proj", 0), key=("qkv_proj", 1))},
    )
)
