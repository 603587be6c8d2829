"""Gemma 3 (text): norms before and after each block, norms on heads, embeddings times sqrt(hidden).

The embedding's factor follows the hidden size, so a cut would shrink what enters the stream. It is folded into the
stored embedding; where that is also the output matrix, the final norm's gain (1 + weight) takes it out again.
"""

from nestling.anatomy.architectures._dense import (
    ATTENDS,
    ATTENTION,
    ATTENTION_BIAS,
    KV_CACHE,
    MLP,
    MODEL,
    PRE_NORMS,
    SIZES,
    axes,
)
from nestling.anatomy.architectures.qwen import HEAD_NORMS
from nestling.anatomy.declare import Architecture, Rescale, register

register(
    Architecture(
        model_type="gemma3_text",
        axes=axes(),
        sizes=SIZES,
        tensors=MODEL,
        blocks={
            "attention": ATTENTION | ATTENTION_BIAS | HEAD_NORMS,
            "mlp": MLP,
            "norms": PRE_NORMS
            | {
                "pre_feedforward_layernorm.weight": "hidden",
                "post_feedforward_layernorm.weight": "hidden",
            },
        },
        kv_cache=KV_CACHE,
        attends=ATTENDS,
        logits_softcap="final_logit_softcapping",
        rescale=(
            Rescale("model.embed_tokens.weight", "hidden", power=-0.5),
            Rescale("lm_head.weight", "hidden", power=-0.5, tied=True),
            Rescale("model.norm.weight", "hidden", power=0.5, offset=1.0, tied=True),
        ),
    )
)
