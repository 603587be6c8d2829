"""DeepSeek-V3: latent attention, a few dense layers first, then routed experts in groups beside shared ones.

Experts are chosen from the best groups, so every group keeps as many. The width of an expert is that of the shared ones
too, so it stays; so do the heads, which share the latent.
"""

from nestling.anatomy.architectures._dense import MLP, MODEL, PRE_NORMS
from nestling.anatomy.declare import Architecture, Axis, Config, Routed, register


def refuses(config: Config) -> str | None:
    """The router adds up the two best of each group, and chooses among the best groups."""
    size = config.n_routed_experts // config.n_group
    if size < 2:
        return f"n_group={config.n_group} groups of n_routed_experts={config.n_routed_experts} have fewer than 2"
    if size * config.topk_group < config.num_experts_per_tok:
        return f"topk_group={config.topk_group} groups of {size} experts are fewer than num_experts_per_tok"
    return None


def blocks(config: Config, layer: int) -> tuple[str, ...]:
    """The first layers are dense."""
    return ("attention", "mlp" if layer < config.first_k_dense_replace else "moe", "norms")


register(
    Architecture(
        model_type="deepseek_v3",
        axes=(
            Axis(
                "hidden",
                "hidden_size",
                scope="model",
                scored_at=("self_attn.q_proj", "self_attn.q_a_proj", "mlp.gate_proj", "mlp.shared_experts.gate_proj"),
            ),
            Axis("ffn", "intermediate_size", scored_at=("mlp.down_proj",), metric="relative"),
            Axis(
                "experts",
                "n_routed_experts",
                within=("eg",),
                active="num_experts_per_tok",
                scored_at=("mlp.experts.down_proj",),
            ),
        ),
        sizes={
            "vocab": "vocab_size",
            "eg": "n_group",
            "heads": "num_attention_heads",
            "qk": lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
            "kv_up": lambda config: config.qk_nope_head_dim + config.v_head_dim,
            "v": "v_head_dim",
            "rope": "qk_rope_head_dim",
            "qrank": lambda config: config.q_lora_rank or 0,
            "kvrank": "kv_lora_rank",
            "neuron": "moe_intermediate_size",
            "shared": lambda config: config.moe_intermediate_size * config.n_shared_experts,
        },
        tensors=MODEL,
        blocks={
            "attention": {
                "self_attn.q_proj.weight?": "(heads qk) hidden",
                "self_attn.q_a_proj.weight?": "qrank hidden",
                "self_attn.q_a_proj.bias?": "qrank",
                "self_attn.q_a_layernorm.weight?": "qrank",
                "self_attn.q_b_proj.weight?": "(heads qk) qrank",
                "self_attn.kv_a_proj_with_mqa.weight": "(kvrank + rope) hidden",
                "self_attn.kv_a_proj_with_mqa.bias?": "(kvrank + rope)",
                "self_attn.kv_a_layernorm.weight": "kvrank",
                "self_attn.kv_b_proj.weight": "(heads kv_up) kvrank",
                "self_attn.o_proj.weight": "hidden (heads v)",
                "self_attn.o_proj.bias?": "hidden",
            },
            "mlp": MLP,
            "moe": {
                "mlp.gate.weight": "(eg experts) hidden",
                "mlp.gate.e_score_correction_bias": "(eg experts)",
                "mlp.experts.gate_up_proj": "(eg experts) (neuron + neuron) hidden",
                "mlp.experts.down_proj": "(eg experts) hidden neuron",
                "mlp.shared_experts.gate_proj.weight": "shared hidden",
                "mlp.shared_experts.up_proj.weight": "shared hidden",
                "mlp.shared_experts.down_proj.weight": "hidden shared",
            },
            "norms": PRE_NORMS,
        },
        layer_blocks=blocks,
        explicit={},
        kv_cache={"attention": ("heads qk", "heads v")},
        attends={"attention": "heads qk"},
        attention={},  # a latent instead of keys and values per head
        layer_thresholds=("first_k_dense_replace",),
        routed=Routed("mlp.gate", "mlp.experts", post="norm_topk_prob", bias="e_score_correction_bias"),
        refuses=refuses,
    )
)
