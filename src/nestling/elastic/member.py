"""A member of a family: a runnable model whose weights are views of the sorted parent's.

Where every axis keeps its first units, the kept part of a tensor is a window on the parent's storage, so a member
costs next to no memory. The member is a stock transformers model of the member's config, built without weights and
given windows. A matrix whose kept rows or columns lie in several runs (query heads inside KV groups, gate and up in
one matrix) has no single window: `Blocks` multiplies run by run instead. Vectors that have none are copied.

`connect` puts differentiable windows on the parent's parameters in their place for a training step, so that gradients
flow into the parent and the step costs what the member costs. Nothing here knows an architecture.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import Rescale, TensorSpec
from nestling.elastic.windows import Window, runs_of, scattered, seen_through, windows
from nestling.quiet import quiet
from nestling.shape import child_config
from nestling.surgery.choose import Selection
from nestling.surgery.cut import class_for, renamed


@dataclass(frozen=True)
class Part:
    """One tensor of a member: where it comes from, and the module and attribute that hold it."""

    spec: TensorSpec
    window: Window
    module: nn.Module
    attribute: str
    factor: float = 1.0  # of a vector (w + offset) * factor - offset; matrices have it on their module's output
    offset: float = 0.0

    @property
    def seen(self) -> Any:
        """The same for windows of one member that are alike."""
        return self.spec.name if scattered(self.window) else self.window

    @property
    def looked_up(self) -> bool:
        """Whether rows are looked up in it, so that its gradient has few."""
        return isinstance(self.module, nn.Embedding)

    def of(self, kept: Tensor) -> Tensor:
        """What the member computes with, from what its window shows of the parent's tensor: that, unless scaled."""
        return kept if self.factor == 1 else (kept + self.offset) * self.factor - self.offset


class Blocks(nn.Module):
    """A linear layer whose matrix is kept in several windows on a larger one.

    rows, columns: runs of kept rows and columns, as (start, length). `weight`, where it is set, is used instead.
    """

    def __init__(
        self, weight: Tensor, rows: list[tuple[int, int]], columns: list[tuple[int, int]], bias: Tensor | None
    ):
        super().__init__()
        self.blocks = [
            [nn.Parameter(weight[r : r + m, c : c + n], requires_grad=False) for c, n in columns] for r, m in rows
        ]
        self.windows = nn.ParameterList(itertools.chain(*self.blocks))  # counted among the parameters
        self.columns = [n for _, n in columns]
        self.in_features, self.out_features = sum(self.columns), sum(n for _, n in rows)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if "weight" in self.__dict__:
            return F.linear(inputs, self.__dict__["weight"], self.bias)
        pieces = inputs.split(self.columns, dim=-1)
        rows = [sum(F.linear(x, block) for x, block in zip(pieces, row, strict=True)) for row in self.blocks]
        output = cast(Tensor, rows[0]) if len(rows) == 1 else torch.cat(cast(list[Tensor], rows), dim=-1)
        return output if self.bias is None else output + self.bias


class Member:
    """A selection of prefixes of a parent, as a model that shares its storage.

    parent: sorted, and alive as long as the member. selection: first units of every axis, in order.
    """

    def __init__(self, parent: PreTrainedModel, selection: Selection):
        self.parent, self.selection = parent, selection
        self.model = _skeleton(parent, selection)
        self.parts = [self._part(spec) for spec in selection.anatomy.tensors.values() if selection.keeps(spec)]
        self.copied_bytes = 0
        held: dict[Any, nn.Parameter] = {}
        for part in self.parts:
            self._hold(part, held)
        self._scale_outputs()
        for part in self.parts:
            if part.looked_up:  # without it the gradient is a matrix of zeros with the rows of a batch
                cast(nn.Embedding, part.module).sparse = True
        self.model.eval()

    def used(self) -> Iterator[Tensor]:
        """The parent's tensors that this member has a part of."""
        return (self.tensor(part) for part in self.parts)

    def tensor(self, part: Part) -> Tensor:
        """The parent's tensor that a part is cut from, as it is now."""
        return tensor_of(self.parent, part.spec.name)

    def disconnect(self) -> None:
        """Back to plain windows, without gradients."""
        for part in self.parts:
            part.module.__dict__.pop(part.attribute, None)

    def _part(self, spec: TensorSpec) -> Part:
        anatomy, form = self.selection.anatomy, self.selection.form
        place = {layer: position for position, layer in enumerate(form.layers)}
        path, _, attribute = renamed(anatomy, spec, place).rpartition(".")
        tensor = tensor_of(self.parent, spec.name)
        window = _window(self.selection.index(spec), tensor.shape)
        module = self.model.get_submodule(path)
        if scattered(window) and type(module) is nn.Linear and len(window) == 2:
            module = _in_blocks(module, tensor.detach(), window)
            self.model.set_submodule(path, module)
        factors = {rescale.tensor: (factor, rescale.offset) for rescale, factor in _rescales(self.selection)}
        factor, offset = factors.get(spec.name, (1.0, 0.0)) if len(window) == 1 else (1.0, 0.0)
        return Part(spec, window, module, attribute, factor, offset)

    def _hold(self, part: Part, held: dict[Any, nn.Parameter]) -> None:
        if isinstance(part.module, Blocks) and part.attribute == "weight":
            return
        tensor = self.tensor(part).detach()
        key = tensor.data_ptr(), part.factor, part.seen
        if key not in held:  # tied tensors stay one parameter
            kept = part.of(seen_through(part.window, tensor))
            self.copied_bytes += 0 if _shares(kept, tensor) else kept.numel() * kept.element_size()
            held[key] = nn.Parameter(kept, requires_grad=False)
        if part.attribute in part.module._buffers:
            part.module._buffers[part.attribute] = held[key].data
        else:
            part.module._parameters[part.attribute] = held[key]

    def _scale_outputs(self) -> None:
        for rescale, factor in _rescales(self.selection):
            spec = self.selection.anatomy.tensors[rescale.tensor]
            if len(spec.layout) > 1:
                module = self.model.get_submodule(spec.module)
                module.register_forward_hook(lambda module, args, output, factor=factor: output * factor)


def connect(members: Sequence[Member]) -> None:
    """Let members of one parent run on differentiable windows of its parameters, all of a tensor in one function.

    They stay until the next call or `disconnect`, so a recomputation in the backward pass still sees them.
    """
    parts: dict[Tensor, dict[Any, list[Part]]] = {}
    for member in members:
        member.disconnect()
        for part in member.parts:
            alike = (id(member), part.seen, part.looked_up)
            parts.setdefault(member.tensor(part), {}).setdefault(alike, []).append(part)
    for tensor, groups in parts.items():
        seen = windows(tensor, [same[0].window for same in groups.values()])
        for kept, same in zip(seen, groups.values(), strict=True):
            for part in same:
                part.module.__dict__[part.attribute] = part.of(kept)  # found before the registered parameter


def _window(index: tuple[LongTensor | None, ...], shape: tuple[int, ...]) -> Window:
    window: list[tuple[int, int] | LongTensor | None] = []
    for kept, size in zip(index, shape, strict=True):
        if kept is not None and kept.dim() > 1:
            kept = cast(LongTensor, kept[0])  # the first neurons of every expert alike
        found = runs_of(kept, size)
        window.append(None if found == [(0, size)] else found[0] if len(found) == 1 else kept)
    return tuple(window)


def _skeleton(parent: PreTrainedModel, selection: Selection) -> PreTrainedModel:
    """A model of the member's config whose parameters take no memory; its buffers are real."""
    config = child_config(selection.anatomy, selection.form)
    config.architectures = None
    with quiet(), init_empty_weights(include_buffers=False), torch.device(parent.device):
        model = class_for(config)._from_config(
            config, dtype=parent.dtype, attn_implementation=parent.config._attn_implementation
        )
    model.generation_config = parent.generation_config
    return cast(PreTrainedModel, model)


def _in_blocks(linear: nn.Linear, weight: Tensor, window: Window) -> Blocks:
    rows, columns = (runs_of(kept, size) for kept, size in zip(window, weight.shape, strict=True))
    return Blocks(weight, rows, columns, linear.bias)


def _rescales(selection: Selection) -> list[tuple[Rescale, float]]:
    """The corrections that this selection needs, with their factors."""
    found, anatomy = [], selection.anatomy
    for rescale in anatomy.architecture.rescale:
        kept, full = selection.form.sizes[0][rescale.letter], anatomy.sizes(None)[rescale.letter]
        if kept != full and rescale.tied in (None, anatomy.tied) and rescale.tensor in anatomy.tensors:
            found.append((rescale, (kept / full) ** rescale.power))
    return found


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A model's tensor by its full name."""
    path, _, attribute = name.rpartition(".")
    return cast(Tensor, getattr(model.get_submodule(path), attribute))


def _shares(kept: Tensor, tensor: Tensor) -> bool:
    return kept.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
