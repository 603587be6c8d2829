"""Llama and the decoders that share its layers: SmolLM, Llama 3, Mistral, Granite, SmolLM3."""

from nestling.anatomy.architectures._dense import (
    ATTENDS,
    ATTENTION,
    ATTENTION_BIAS,
    KV_CACHE,
    MLP,
    MLP_BIAS,
    MODEL,
    PRE_NORMS,
    SIZES,
    axes,
)
from nestling.anatomy.declare import Architecture, Attention, register

LLAMA = register(
    Architecture(
        model_type="llama",
        mixture_kin="mixtral",
        axes=axes(),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS,
            "mlp": MLP | MLP_BIAS,
            "norms": PRE_NORMS,
        },
        kv_cache=KV_CACHE,
        attends=ATTENDS,
    )
)

register(
    Architecture(
        model_type="mistral",
        mixture_kin="mixtral",
        axes=axes(),
        sizes=SIZES,
        tensors=MODEL,
        blocks={"attention": ATTENTION, "mlp": MLP, "norms": PRE_NORMS},
        kv_cache=KV_CACHE,
        attends=ATTENDS,
    )
)

register(
    Architecture(
        model_type="granite",
        mixture_kin="granitemoe",
        shared_kin="granitemoeshared",
        axes=axes(),
        sizes=SIZES,
        tensors=MODEL,
        blocks=LLAMA.blocks,
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        logits_divisor="logits_scaling",
    )
)

register(
    Architecture(
        model_type="smollm3",
        axes=axes(),
        sizes=SIZES,
        tensors=MODEL,
        blocks=LLAMA.blocks,
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        attention={"attention": Attention(rotary=lambda config, layer: bool(config.no_rope_layers[layer]))},
        per_layer_fields=("layer_types", "no_rope_layers"),
    )
)
