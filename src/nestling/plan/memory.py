"""What one device holds while a student is distilled, part by part, from the anatomy alone.

Bytes per weight of the student: 4 itself, 4 its gradient, 8 AdamW's moments; whole on every device with 4 more for the
buckets in which gradients are exchanged (DDP) and 2 for its bfloat16 copy, or divided by the devices (FSDP) with two
layers and everything outside the layers gathered at a time. The teacher stays in the dtype of its checkpoint.
Activations that a layer keeps for its backward pass: every matrix's input and output in bfloat16, and 12 bytes for each
channel of a norm; recomputed, a layer keeps its float32 input and one layer at a time the rest. Attention is taken to
keep no scores. Logits exist for a chunk of tokens (`nestling.train.losses`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from nestling.anatomy import Anatomy, TensorSpec
from nestling.cost import cost_of_form, item_bytes
from nestling.shape import Form
from nestling.train.losses import CHUNK_NUMBERS_ELSEWHERE

NORM_BYTES = 12  # per channel and token: a float32 input, the normalized input, and what is multiplied by the gain
CHUNK_BYTES = 36  # per number of a chunk of logits: two bfloat16 originals and eight float32 arrays of the loss


@dataclass(frozen=True)
class Figures:
    """What a model's memory and time depend on.

    params: all weights. layer_params: of the largest layer. rest_params: outside the layers. flops: of a forward pass
    per token, averaged over a sequence. layer_bytes: what each layer keeps of a token. item: bytes of a weight.
    """

    params: int
    layer_params: int
    rest_params: int
    hidden: int
    vocab: int
    layers: int
    flops: int
    layer_bytes: tuple[int, ...]
    item: int

    @classmethod
    def of(cls, anatomy: Anatomy, form: Form, context: int) -> Figures:
        """context: tokens per sequence; the tokens of one see half of it on average."""
        cost = cost_of_form(anatomy, form, context // 2)
        place = {layer: position for position, layer in enumerate(form.layers)}
        counts, kept = [0] * len(place), [0] * len(place)
        for position, specs in _by_layer(anatomy, place).items():
            sizes = form.sizes[position]
            counts[position] = sum(math.prod(d.size(sizes) for d in spec.layout) for spec in specs)
            kept[position] = _kept(anatomy, specs, sizes)
        sizes = form.sizes[0]
        return cls(
            params=cost.params,
            layer_params=max(counts),
            rest_params=cost.params - sum(counts),
            hidden=sizes["hidden"],
            vocab=sizes["vocab"],
            layers=len(place),
            flops=cost.flops_per_token,
            layer_bytes=tuple(kept),
            item=item_bytes(anatomy.config, None),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. gathered: weights and gradients of a sharded model that are whole for a moment."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory(student: Figures, teacher: Figures, devices: int, tokens: int, fsdp: bool, recompute: bool) -> Memory:
    """What a device holds at its fullest. tokens: that go through it at once."""
    share = devices if fsdp else 1
    gathered = 0
    if fsdp:  # bfloat16 weights, their gradients, and those in float32 while they are exchanged
        gathered = (2 * student.layer_params + student.rest_params) * 2
        gathered += (student.layer_params + student.rest_params) * (2 + 4)
        gathered += (2 * teacher.layer_params + teacher.rest_params) * teacher.item
    return Memory(
        weights=-(-4 * student.params // share) + (0 if fsdp else 2 * student.params),
        gradients=-(-4 * student.params // share) + (0 if fsdp or devices == 1 else 4 * student.params),
        optimizer=-(-8 * student.params // share),
        teacher=-(-teacher.item * teacher.params // share),
        gathered=gathered,
        activations=tokens * _activations(student, teacher, recompute),
        logits=_logits(student, teacher, tokens),
    )


def _activations(student: Figures, teacher: Figures, recompute: bool) -> int:
    """Bytes per token; the teacher keeps nothing but what one of its layers works on."""
    largest = max(student.layer_bytes)
    kept = student.layers * 4 * student.hidden + largest if recompute else sum(student.layer_bytes)
    return kept + max(0, max(teacher.layer_bytes) // 2 - largest)


def _logits(student: Figures, teacher: Figures, tokens: int) -> int:
    """The chunk, last states of both models with their gradients, and the head's gradient in float32."""
    numbers = min(CHUNK_NUMBERS_ELSEWHERE, tokens * student.vocab)
    states = tokens * (2 * 4 * student.hidden + 4 * teacher.hidden)
    return CHUNK_BYTES * numbers + states + 4 * student.vocab * student.hidden


def _by_layer(anatomy: Anatomy, place: Mapping[int, int]) -> dict[int, list[TensorSpec]]:
    found: dict[int, list[TensorSpec]] = {}
    for spec in anatomy.tensors.values():
        if spec.layer is not None and spec.layer in place and spec.computes:
            found.setdefault(place[spec.layer], []).append(spec)
    return found


def _kept(anatomy: Anatomy, specs: list[TensorSpec], sizes: Mapping[str, int]) -> int:
    """Bytes that a layer keeps of one token: each distinct input once, each output, and norms."""
    read: dict[tuple[str | None, str], int] = {}
    written, norms = 0, 0
    for spec in specs:
        axis = next(
            (axis for axis in anatomy.axes.values() if axis.active and axis.letter in spec.layout[0].letters), None
        )
        if len(spec.layout) == 1:
            norms += spec.layout[0].size(sizes) if spec.name.endswith(".weight") else 0
        elif axis is not None and len(spec.layout) > 2:  # each of a token's experts reads and writes
            active = getattr(anatomy.config, str(axis.active))
            written += active * (spec.layout[1].size(sizes) + spec.layout[2].size(sizes))
        else:
            written += spec.layout[0].size(sizes)
            if len(spec.layout) == 2:
                read[spec.block, str(spec.layout[1])] = spec.layout[1].size(sizes)
    return 2 * (sum(read.values()) + written) + NORM_BYTES * norms
