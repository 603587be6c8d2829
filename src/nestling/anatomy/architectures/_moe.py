"""What models with routed experts have in common: a router, and experts as tensors with one matrix for each.

Letters: `experts` of a layer, `neuron` inside an expert. Neurons are chosen expert by expert, and as many in each,
since all experts of a layer are one tensor.
"""

from nestling.anatomy.declare import Axis, Config

EXPERTS = {
    "experts.gate_up_proj": "experts (neuron + neuron) hidden",
    "experts.down_proj": "experts hidden neuron",
}

# The expert that all tokens of a Granite mixture share.
SHARED_MLP = {
    "shared_mlp.input_linear.weight": "(ffn + ffn) hidden",
    "shared_mlp.output_linear.weight": "hidden ffn",
}

# The expert that all tokens of a Qwen mixture share, with its gate, and what is read of it.
GATED_SHARED = {
    "mlp.shared_expert.gate_proj.weight": "shared hidden",
    "mlp.shared_expert.up_proj.weight": "shared hidden",
    "mlp.shared_expert.down_proj.weight": "hidden shared",
    "mlp.shared_expert_gate.weight": "1 hidden",
}
SHARED_AXIS = Axis(
    "shared", "shared_expert_intermediate_size", scored_at=("mlp.shared_expert.down_proj",), metric="relative"
)


def expert_axes(experts: str, width: str, at: str = "mlp", groups: tuple[str, ...] = ()) -> tuple[Axis, ...]:
    """Experts, and neurons in them, by the config fields that hold their sizes.

    at: the block they are in. groups: letter of the groups that experts are in, of which each keeps as many.
    """
    read = (f"{at}.experts.down_proj",)
    inside = (*groups, "experts")
    return (
        Axis("experts", experts, within=groups, active="num_experts_per_tok", scored_at=read),
        Axis("neuron", width, within=inside, counts_all=False, scored_at=read, metric="relative"),
    )


def routed_tensors(at: str = "mlp", router: str = "gate") -> dict[str, str]:
    """The tensors of a block of gated experts."""
    return {f"{at}.{router}.weight": "experts hidden"} | {f"{at}.{name}": spec for name, spec in EXPERTS.items()}


def is_sparse(config: Config, layer: int) -> bool:
    """Whether a Qwen layer has experts: unless it is listed as dense or the sparse step passes it over."""
    return layer not in (config.mlp_only_layers or []) and (layer + 1) % config.decoder_sparse_step == 0
