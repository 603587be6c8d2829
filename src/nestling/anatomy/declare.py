"""The words in which an architecture is declared: `Axis`, `Architecture`, and the register of them all.

A declaration is data. It says which config field holds which size, how every tensor is laid out (see `notation`),
which dimensions may shrink and where a unit's activation can be read. It holds no method, and no method holds an
architecture: pruning, masks, costs and scores are derived from it by `Anatomy`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nestling.errors import UnsupportedArchitecture

Config = Any
SizeOf = str | Callable[[Config], int]


@dataclass(frozen=True)
class Axis:
    """A dimension that can shrink.

    letter: its name in tensor specs.
    field: the config field that holds its size; also the axis's public name.
    scope: `model` if one set of units runs through the whole model, `layer` if every layer has its own.
    within: letters of the units inside which this axis's units may move; they never leave them.
    counts_all: whether `field` counts the units of all outer units together (attention heads of all KV groups)
        or of one of them.
    active: config field that says how many of the units one token uses; all of them unless given.
    scored_at: modules of a layer whose input is the axis's activation and whose weight's last dimension it is; or, as
        `mixer.in_proj[1]`, modules that write it as a part of their output, parts numbered as in the weight's first
        dimension. combine: what becomes of the scores at several of them, their `sum` or their `product`.
    also_at: other places to score it at, by a short name, for comparisons (see `nestling.ranking.rank`).
    metric: what its units are scored by unless the caller says otherwise (see `nestling.ranking.metrics`).
    merges: whether a unit that stays may take up one that goes (see `nestling.surgery.merge`).
    """

    letter: str
    field: str
    scope: Literal["layer", "model"] = "layer"
    within: tuple[str, ...] = ()
    counts_all: bool = True
    active: str | None = None
    scored_at: tuple[str, ...] = ()
    combine: Literal["sum", "product"] = "sum"
    also_at: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict, hash=False)
    metric: str = "contribution"
    merges: bool = False


@dataclass(frozen=True)
class Rescale:
    """A tensor that must be multiplied by (kept / full) ** power when an axis shrinks, to keep the function.

    offset: what the model adds to the stored values before use (1 for norms that compute `1 + weight`).
    tied: apply only if the word embeddings are tied (True), only if not (False), or always (None).
    """

    tensor: str
    letter: str
    power: float
    offset: float = 0.0
    tied: bool | None = None


def sees_all(config: Config, layer: int) -> bool:
    """Whether a layer's attention reaches every token before: no sliding window and no chunks."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return types[layer] == "full_attention"
    return getattr(config, "sliding_window", None) is None


@dataclass(frozen=True)
class Attention:
    """Where softmax attention is in a layer, for methods that change what it remembers.

    module: the attention module, relative to the layer. query, key: the module's projection, and which product of its
    rows they are (of a fused one). full: whether a layer reaches every token before. rotary: whether a layer rotates
    queries and keys by the `position_embeddings` it is called with. rotate: the function in the module's modeling file
    that does it, called with (query, key, cos, sin).
    """

    module: str = "self_attn"
    query: tuple[str, int] = ("q_proj", 0)
    key: tuple[str, int] = ("k_proj", 0)
    full: Callable[[Config, int], bool] = sees_all
    rotary: Callable[[Config, int], bool] = lambda config, layer: True
    rotate: str = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class Routed:
    """Where a layer with routed experts has them: paths of its router and its experts, relative to the layer.

    top_k: config field that says how many a token uses. post: whether the weights of the chosen are normalized over
    them, as the config says it (a value, or the name of a field). bias: the router's buffer that is added to the scores
    for the choice alone, if it has one. shared: path of the expert that all tokens of the layer share, if there can be
    one; a gate of its own, if it has one, is that path with `_gate` after it. neuron: the letter of the neurons inside
    an expert.
    """

    router: str
    experts: str
    top_k: str = "num_experts_per_tok"
    post: bool | str = True
    bias: str | None = None
    shared: str | None = None
    neuron: str = "neuron"


@dataclass(frozen=True)
class Shared:
    """Tensors that several layers use in turn: one set of them serves a layer here and another further on.

    block: the block that they make up. count: how many sets there are. Layers with the block take the sets in turn, the
    first one set 0, and so on around; sets are tied where the word embeddings are, otherwise every layer has its own. A
    name with `{use}` in it stands for one tensor for each layer that uses the set, numbered among all with the block.
    """

    block: str
    count: Callable[[Config], int]


@dataclass(frozen=True)
class Architecture:
    """What models of one `model_type` are made of.

    axes: everything that can shrink, layers excepted (they always can).
    sizes: letters that cannot shrink, with the config field or function that gives their size.
    tensors: specs of the whole model's tensors; a name that ends in `?` may be absent.
    layers: path of the list of layers.
    blocks: named groups of tensors in a layer, names relative to the layer.
    layer_blocks: which blocks the i-th layer has; all of them unless given.
    explicit: config fields to write down for letters whose size the config may leave to be derived from others.
    kv_cache: what one token adds to the KV cache of a layer that has the block named, as products of letters.
    attends: per block with attention, the product of letters that is one query's width over all heads.
    attention: per block with plain softmax attention, where it is and how it is called.
    state: what a sequence keeps in a layer that has the block named, however long it is, as products of letters: a
        recurrent state, in float32. recent: the same, for what is kept in the model's dtype (a convolution's inputs).
    inner_norms: RMS norms that a mixer may apply inside its own kernel, maybe group by group; where units are cut,
        every group loses the same part of them.
    tied: the output matrix, which is the input embedding where the config ties them. lookup: the input embedding.
    per_layer_fields: config fields with one value per layer, cut along with the layers.
    layer_numbers: config fields that list the numbers of some layers. layer_thresholds: those that hold one number.
    listed_blocks: config fields that list the numbers of all layers with the block named.
    strides: tensors of a layer whose rows a fused kernel reads part by part, with the number of elements that the
        parts must be multiples of.
    keeps: blocks of which one layer always stays: where the others are removed, the model cannot use its cache.
    layer_tuples: whether a layer returns a tuple whose first item is its hidden state.
    derived: config fields that follow from the sizes, with the function that gives them; None leaves a field alone.
    mixture_kin: model_type of the mixture of experts whose other parts are this model's. dense_kin: the other way.
    shared_kin: that of the mixture which has an expert for all tokens too.
    routed: where layers with routed experts have their router and experts.
    shared: the block whose tensors several layers use, if there is one.
    refuses: why a config is not possible although its class takes it, in a few words; None if it is.
    alike: width fields that have one value in all layers, because the model's own code needs it so.
    layer_arguments: what a layer's class takes after the config and the layer's number.
    logits_divisor, logits_factor, logits_softcap: config fields by which logits are divided, multiplied, tanh-capped.
    rescale: corrections that keep the function when an axis shrinks.
    depth_field: config field that holds the number of layers.
    """

    model_type: str
    axes: tuple[Axis, ...]
    sizes: Mapping[str, SizeOf]
    tensors: Mapping[str, str]
    blocks: Mapping[str, Mapping[str, str]]
    layers: str = "model.layers"
    layer_blocks: Callable[[Config, int], tuple[str, ...]] | None = None
    explicit: Mapping[str, str] = field(default_factory=lambda: {"d": "head_dim"})
    kv_cache: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attends: Mapping[str, str] = field(default_factory=dict)
    attention: Mapping[str, Attention] = field(default_factory=lambda: {"attention": Attention()})
    state: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inner_norms: tuple[str, ...] = ()
    strides: Mapping[str, int] = field(default_factory=dict)
    tied: str = "lm_head.weight"
    lookup: str = "model.embed_tokens.weight"
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    layer_numbers: tuple[str, ...] = ()
    layer_thresholds: tuple[str, ...] = ()
    listed_blocks: Mapping[str, str] = field(default_factory=dict)
    keeps: tuple[str, ...] = ()
    layer_tuples: bool = False
    derived: Mapping[str, Callable[[Config], int | None]] = field(default_factory=dict)
    mixture_kin: str | None = None
    shared_kin: str | None = None
    dense_kin: str | None = None
    routed: Routed | None = None
    shared: Shared | None = None
    refuses: Callable[[Config], str | None] | None = None
    alike: tuple[str, ...] = ()
    layer_arguments: Callable[[Config, int], tuple[Any, ...]] | None = None
    logits_divisor: str | None = None
    logits_factor: str | None = None
    logits_softcap: str | None = None
    rescale: tuple[Rescale, ...] = ()
    depth_field: str = "num_hidden_layers"


ARCHITECTURES: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Make an architecture known under its `model_type`; returns it."""
    ARCHITECTURES[architecture.model_type] = architecture
    return architecture


def architecture_of(config: Config) -> Architecture:
    """The declaration for a config. Raises `UnsupportedArchitecture` that names the type and what to declare."""
    name = getattr(config, "base_model_type", None) or getattr(config, "model_type", None)
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedArchitecture(
            f"architecture '{name}' is not described (known: {known}): declare its axes, sizes and tensors in one file "
            f"under nestling/anatomy/architectures/, as CONTRIBUTING.md shows"
        )
    return ARCHITECTURES[name]
