"""Mamba-2: every layer one norm and one mixer, nothing else.

Its config wants heads times channels to be `expand` times the hidden size, `expand` a whole number: a shape that leaves
none is refused, with the nearest that does.
"""

from nestling.anatomy.architectures._mamba2 import ALIGNED, RECENT, STATE, expand, tensors
from nestling.anatomy.architectures._mamba2 import axes as mamba_axes
from nestling.anatomy.declare import Architecture, Axis, register

register(
    Architecture(
        model_type="mamba2",
        axes=(
            Axis("hidden", "hidden_size", scope="model", scored_at=("mixer.in_proj",)),
            *mamba_axes("mixer", "num_heads", "head_dim", "state_size"),
        ),
        sizes={"vocab": "vocab_size", "g": "n_groups", "k": "conv_kernel"},
        tensors={
            "backbone.embeddings.weight": "vocab hidden",
            "backbone.norm_f.weight": "hidden",
            "lm_head.weight": "vocab hidden",
        },
        blocks={"mamba": tensors("mixer"), "norm": {"norm.weight": "hidden"}},
        layers="backbone.layers",
        explicit={},
        state={"mamba": STATE},
        recent={"mamba": RECENT},
        inner_norms=("mixer.norm",),
        strides={"mixer.in_proj.weight": ALIGNED},
        lookup="backbone.embeddings.weight",
        per_layer_fields=(),
        derived={"expand": expand("num_heads", "head_dim")},
    )
)
