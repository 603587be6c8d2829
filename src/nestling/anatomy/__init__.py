"""What models are made of: the notation, the declarations, and what is derived from them for one model."""

import nestling.anatomy.architectures  # noqa: F401  registers every architecture
from nestling.anatomy.anatomy import Anatomy, Place, TensorSpec
from nestling.anatomy.declare import ARCHITECTURES, Architecture, Axis, Rescale, Routed, architecture_of, register
from nestling.anatomy.head import cache_name, decoder, logits_head
from nestling.anatomy.per_layer import register_per_layer
from nestling.anatomy.scan import compiled_steps, suited_scans
from nestling.experts import register_experts

register_per_layer()
register_experts()

__all__ = [
    "ARCHITECTURES",
    "Anatomy",
    "Architecture",
    "Axis",
    "Place",
    "Rescale",
    "Routed",
    "TensorSpec",
    "architecture_of",
    "cache_name",
    "compiled_steps",
    "decoder",
    "logits_head",
    "register",
    "suited_scans",
]
