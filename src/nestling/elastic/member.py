"""A member of a family: a runnable model whose weights are views of the sorted parent's.

Where every axis keeps its first units, the kept part of a tensor is a window on the parent's storage, so a member
costs next to no memory. The member is a stock transformers model of the member's config, built without weights and
given windows. A matrix whose kept rows or columns lie in several runs (query heads inside KV groups, gate and up in
one matrix) has no single window: `Blocks` multiplies run by run instead. Vectors that have none are copied.

`connected` puts windows on the parent's parameters in their place for a training step, so that gradients flow into
the parent and the step costs what the member costs. Nothing here knows an architecture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import Rescale, TensorSpec
from nestling.quiet import quiet
from nestling.shape import child_config
from nestling.surgery.choose import Selection
from nestling.surgery.cut import class_for, renamed

# For each dimension of a tensor: all of it, one run of elements as (start, length), or the elements one by one.
Runs = list[tuple[int, int]]
Window = tuple[tuple[int, int] | LongTensor | None, ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a member: where it comes from, and the module and attribute that hold it."""

    spec: TensorSpec
    window: Window
    module: nn.Module
    attribute: str
    factor: float = 1.0  # of a vector (w + offset) * factor - offset; matrices have it on their module's output
    offset: float = 0.0

    def key(self, tensor: Tensor) -> Any:
        """The same for parts that are one tensor: tied embeddings."""
        scattered = any(isinstance(kept, Tensor) for kept in self.window)
        return tensor.data_ptr(), self.factor, self.spec.name if scattered else self.window

    def of(self, tensor: Tensor) -> Tensor:
        """The kept part of the parent's tensor, differentiable: a view if there is one."""
        kept = seen_through(self.window, tensor)
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
        self.model.eval()

    @contextmanager
    def connected(self, weights: Callable[[str], Tensor] | None = None) -> Iterator[PreTrainedModel]:
        """The model on differentiable windows of the parent's parameters; backward may come after the block.

        weights: gives the parent's tensor of a name, its own parameters unless given. A recomputation in the backward
        pass still sees the windows: they stay until the next block or `disconnect`.
        """
        self.disconnect()
        seen: dict[Any, Tensor] = {}
        for part in self.parts:
            tensor = weights(part.spec.name) if weights else tensor_of(self.parent, part.spec.name)
            key = part.key(tensor)
            if key not in seen:
                seen[key] = part.of(tensor)
            part.module.__dict__[part.attribute] = seen[key]  # found before the registered parameter
        yield self.model

    def used(self) -> Iterator[Tensor]:
        """The parent's tensors that this member has a part of."""
        return (tensor_of(self.parent, part.spec.name) for part in self.parts)

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
        if _scattered(window) and type(module) is nn.Linear and len(window) == 2:
            module = _in_blocks(module, tensor.detach(), window)
            self.model.set_submodule(path, module)
        factors = {rescale.tensor: (factor, rescale.offset) for rescale, factor in _rescales(self.selection)}
        factor, offset = factors.get(spec.name, (1.0, 0.0)) if len(window) == 1 else (1.0, 0.0)
        return Part(spec, window, module, attribute, factor, offset)

    def _hold(self, part: Part, held: dict[Any, nn.Parameter]) -> None:
        if isinstance(part.module, Blocks) and part.attribute == "weight":
            return
        tensor = tensor_of(self.parent, part.spec.name).detach()
        key = part.key(tensor)
        if key not in held:  # tied tensors stay one parameter
            kept = part.of(tensor)
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


def seen_through(window: Window, tensor: Tensor) -> Tensor:
    """The elements of a tensor that a window keeps, in their order; a view unless some lie in several runs."""
    for dim, kept in enumerate(window):
        if isinstance(kept, tuple):
            tensor = tensor.narrow(dim, *kept)
        elif kept is not None:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def runs(index: Tensor) -> list[tuple[int, int]]:
    """Stretches of consecutive numbers in an index, as (start, length)."""
    breaks = (torch.nonzero(index.diff() != 1).flatten() + 1).tolist()
    starts = [0, *breaks]
    ends = [*breaks, len(index)]
    return [(int(index[start]), end - start) for start, end in zip(starts, ends, strict=True)]


def _window(index: tuple[LongTensor | None, ...], shape: tuple[int, ...]) -> Window:
    window: list[tuple[int, int] | LongTensor | None] = []
    for kept, size in zip(index, shape, strict=True):
        if kept is not None and kept.dim() > 1:
            kept = cast(LongTensor, kept[0])  # the first neurons of every expert alike
        found = _runs_of(kept, size)
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
    rows, columns = (_runs_of(kept, size) for kept, size in zip(window, weight.shape, strict=True))
    return Blocks(weight, rows, columns, linear.bias)


def _runs_of(kept: tuple[int, int] | Tensor | None, size: int) -> list[tuple[int, int]]:
    return runs(kept) if isinstance(kept, Tensor) else [kept or (0, size)]


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


def _scattered(window: Window) -> bool:
    return any(isinstance(kept, Tensor) for kept in window)


def _shares(kept: Tensor, tensor: Tensor) -> bool:
    return kept.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
