"""What the kept part of a layer can take over from what was pruned: its writing matrices, refit by least squares.

A module that reads an axis (`down_proj`, `o_proj`) writes W a for a token's activations a. A cut loses two things that
the kept activations a_K may foretell: what the pruned units wrote, W_P a_P, and, where the layers right after this one
are removed, what those added to the residual stream, d. Both are regressed on a_K and folded into the matrix:

    W_K <- W_K + (W_P S_PK + D_K) (S_KK + ridge * mean(diag S) I)^-1      S = E[a a^T / |h|^2]    D = E[d a^T / |h|^2]

over calibration tokens, each weighed by the length of the residual stream h that its layer leaves, so that the few
tokens with massive activations do not decide alone. Activations are the parent's. The ridge is strong on purpose: a
weak one fits the calibration text and is worse on other text. A Mamba mixer's output matrix is left as it is when heads
or channels go: it reads a norm over them, so what it reads of the kept ones is no longer the parent's. Folding removed
layers into the matrix before them follows ReplaceMe (arXiv 2505.02819), which fits a map of the module's output instead
of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import Anatomy, decoder
from nestling.anatomy.bypass import evaluating
from nestling.errors import DataError
from nestling.surgery.choose import Selection

RIDGE = 1.0
# Bytes of moments kept from one cut to the next and held at once. A model that needs more is measured anew for every
# cut, some layers in each pass over the batches.
MOMENTS_BYTES = 4 << 30
# Part of what a layer adds to the stream that its writers' outputs may leave unexplained. A norm between a writer and
# the stream (Gemma, OLMo 2) leaves more; there is then no matrix to fold removed layers into.
UNEXPLAINED = 0.02

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Need:
    """What a cut needs of one layer: moments of the inputs of its readers, and of what is added up to layer `end`."""

    layer: int
    end: int  # the layer itself where the next one stays


@dataclass
class Moments:
    """What was measured of a layer.

    inputs: for each reader S `[in, in]`, in the order they are called. added: last layer of a removed run ->
    D^T `[in, hidden]` of the last reader. products: of what the layer adds (r) and what its readers write (w):
    (r.r, r.w, w.w).
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)
    products: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def gain(self) -> float | None:
        """What the layer multiplies its writers' outputs by before adding them; None if it does more than that."""
        total, across, written = self.products.tolist()
        if across <= 0 or 1 - across**2 / (total * written) > UNEXPLAINED:
            return None
        return across / written


class Repair:
    """Calibration batches, and what was measured on them once for any number of cuts of one model.

    batches: mappings with `input_ids` `[batch, seq]` and maybe `attention_mask`. progress: told the tokens of each
    batch, once per pass. Raises `DataError` when there is no batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Batch],
        ridge: float = RIDGE,
        progress: Callable[[int], None] | None = None,
    ):
        self.model, self.batches, self.ridge, self.progress = model, list(batches), ridge, progress
        if not self.batches:
            raise DataError("the calibration data has no batches: give at least one with input_ids [batch, seq]")
        anatomy = Anatomy.of(model)
        self._readers = [
            {
                name: model.get_parameter(name).shape
                for axis in anatomy.axes.values()
                if axis.scope == "layer"
                for name in anatomy.readers(axis, layer)
            }
            for layer in range(anatomy.num_layers)
        ]
        self._known: dict[int, Moments] = {}

    def measure(self, selections: Iterable[Selection], progress: Callable[[int], None] | None = None) -> None:
        """Measure at once what these cuts will need; `refit` does so for its own cut otherwise.

        progress: told the tokens of each batch of this pass, instead of the one given to all.
        """
        needs = {need for selection in selections for need in self._needs(selection)}
        missing = [need for need in needs if not self._has(need)]
        if missing and self._bytes(needs) + self._bytes_known() <= MOMENTS_BYTES:
            self._add(missing, progress)

    def refit(self, selection: Selection) -> dict[str, Tensor]:
        """The parent's writing matrices with what is lost folded into the columns that stay, ready to be cut."""
        needs = self._needs(selection)
        self.measure([selection])
        result: dict[str, Tensor] = {}
        for need in needs:
            if not self._has(need):  # not all fit at once
                self._known = {}
                self._add(self._first_few([other for other in needs if other.layer >= need.layer]))
            result |= self._refit_layer(selection, need)
        return result

    def _refit_layer(self, selection: Selection, need: Need) -> dict[str, Tensor]:
        moments, result = self._known[need.layer], {}
        gain = moments.gain() if need.end > need.layer else None
        for name, own in moments.inputs.items():
            columns = self._columns(selection, name)
            inputs = self._over_uses(selection, need.layer, name, own)
            if inputs is None or (columns is not None and _normed(selection, name)):
                continue
            last = name == next(reversed(moments.inputs))
            added = moments.added[need.end] / gain if gain is not None and last else None
            if columns is not None or added is not None:
                weight = self.model.get_parameter(name).detach()
                result[name] = _folded(weight, inputs, columns, added, self.ridge)
        return result

    def _over_uses(self, selection: Selection, layer: int, name: str, own: Tensor) -> Tensor | None:
        """S of a reader over all kept layers that share it; None where an earlier one has it, or one is not known."""
        anatomy = selection.anatomy
        if anatomy.tensors[name].block != anatomy.sharing.block:
            return own
        kept = [use for use in anatomy.sharing.sharers(layer) if use in selection.form.layers]
        if layer != kept[0] or not all(use in self._known for use in kept):
            return None
        path = anatomy.layer_path
        return sum((self._known[use].inputs[name.replace(path(layer), path(use), 1)] for use in kept[1:]), own)

    def _needs(self, selection: Selection) -> list[Need]:
        """One for each kept layer that loses units, or the layers after it."""
        kept = selection.form.layers
        ends = [following - 1 for following in (*kept[1:], selection.anatomy.num_layers)]
        return [
            Need(layer, end)
            for layer, end in zip(kept, ends, strict=True)
            if self._readers[layer]
            and (end > layer or any(self._cut(selection, name) for name in self._readers[layer]))
        ]

    def _columns(self, selection: Selection, name: str) -> Tensor | None:
        """The columns of a reader that stay; None for all of them."""
        kept = selection.index(selection.anatomy.tensors[name])[-1]
        return None if kept is None or len(kept) == self.model.get_parameter(name).shape[-1] else kept

    def _cut(self, selection: Selection, name: str) -> bool:
        """Whether a reader loses columns that its kept ones may take over."""
        return self._columns(selection, name) is not None and not _normed(selection, name)

    def _has(self, need: Need) -> bool:
        return need.layer in self._known and (need.end == need.layer or need.end in self._known[need.layer].added)

    def _bytes(self, needs: Iterable[Need]) -> int:
        needs = list(needs)
        squares = [shape[-1] ** 2 for layer in {n.layer for n in needs} for shape in self._readers[layer].values()]
        added = [max(s.numel() for s in self._readers[n.layer].values()) for n in needs if n.end > n.layer]
        return 4 * (sum(squares) + sum(added))

    def _bytes_known(self) -> int:
        tensors = [t for known in self._known.values() for t in (*known.inputs.values(), *known.added.values())]
        return sum(4 * tensor.numel() for tensor in tensors)

    def _first_few(self, needs: list[Need]) -> list[Need]:
        """As many from the start as fit in memory together; one at least."""
        count = 1
        while count < len(needs) and self._bytes(needs[: count + 1]) <= MOMENTS_BYTES:
            count += 1
        return needs[:count]

    def _add(self, needs: list[Need], progress: Callable[[int], None] | None = None) -> None:
        found = _Watch(self.model, self._readers, needs).run(self.batches, progress or self.progress)
        for layer, moments in found.items():
            self._known.setdefault(layer, moments).added.update(moments.added)


class _Watch:
    """The hooks of one pass over the batches, and what they add up."""

    def __init__(self, model: PreTrainedModel, readers: list[dict[str, torch.Size]], needs: list[Need]):
        self.model = model
        self.layers = Anatomy.of(model).layers(model)
        self.found = {need.layer: Moments() for need in needs}
        self.modules = {name: layer for layer in self.found for name in readers[layer]}
        self.runs: dict[int, list[int]] = {}  # last layer of a removed run -> layers that take it over
        for need in needs:
            if need.end > need.layer:
                self.runs.setdefault(need.end, []).append(need.layer)
        self._until = {layer: max(need.end for need in needs if need.layer == layer) for layer in self.found}
        self._mask: Tensor | None = None
        self._inputs: dict[str, Tensor] = {}  # what readers read in this batch, not yet weighed
        self._written: dict[int, Tensor] = {}
        self._left: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # weighed input of the last reader, stream, weight

    @torch.no_grad()
    def run(self, batches: list[Batch], progress: Callable[[int], None] | None) -> dict[int, Moments]:
        with ExitStack() as hooks, evaluating(self.model):
            for name, layer in self.modules.items():
                module = self.model.get_submodule(name.rpartition(".")[0])
                hooks.callback(module.register_forward_hook(self._read(name, layer)).remove)
            for layer in sorted(self.found.keys() | self.runs.keys()):
                hook = self.layers[layer].register_forward_hook(self._leave(layer), with_kwargs=True)
                hooks.callback(hook.remove)
            for batch in processes.share(batches):
                inputs = {k: batch[k].to(self.model.device) for k in ("input_ids", "attention_mask") if k in batch}
                self._mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
                decoder(self.model)(**inputs, use_cache=False)
                if progress is not None:
                    progress(inputs["input_ids"].numel() * processes.count())
        self._merge()
        return self.found

    def _merge(self) -> None:
        """Add up what all processes saw; the readers in the order in which the first process called them."""
        if processes.count() == 1:
            return
        called = processes.first(lambda: [list(self.found[layer].inputs) for layer in sorted(self.found)])
        for layer, names in zip(sorted(self.found), called, strict=True):
            found = self.found[layer]
            shapes = {name: self.model.get_parameter(name).shape for name in names}
            found.inputs = {
                name: self._total(found.inputs.get(name), shapes[name][1], shapes[name][1]) for name in names
            }
            ends = [end for end in sorted(self.runs) if layer in self.runs[end]]
            out, width = shapes[names[-1]]
            found.added = {end: self._total(found.added.get(end), width, out) for end in ends}
            found.products = processes.summed(found.products)

    def _total(self, moment: Tensor | None, *shape: int) -> Tensor:
        """The sum of a moment over all processes, of which this one may have seen nothing."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        own = torch.zeros(shape, dtype=dtype, device=self.model.device) if moment is None else moment
        return processes.summed(own).to(dtype)

    def _tokens(self, values: Tensor) -> Tensor:
        """`[batch, seq, dim]`, or all tokens in one row already, -> `[tokens, dim]` of at least float32.

        Squares of half precision overflow.
        """
        values = values.to(torch.promote_types(values.dtype, torch.float32)).flatten(0, -2)
        return values if self._mask is None else values[self._mask.flatten()]

    def _read(self, name: str, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[name] = self._tokens(args[0])
            written = self._tokens(output)
            self._written[layer] = self._written[layer] + written if layer in self._written else written

        return hook

    def _leave(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            stream = self._tokens(output[0] if isinstance(output, tuple) else output)
            for before in self.runs.get(layer, ()):
                inputs, left, weight = self._left[before]
                self._sum(self.found[before].added, layer, inputs.T @ ((stream - left) * weight))
            if layer in self.found:
                entered = self._tokens(args[0] if args else kwargs["hidden_states"])
                self._weigh(layer, entered, stream)
            self._left = {before: left for before, left in self._left.items() if self._until[before] > layer}

        return hook

    def _weigh(self, layer: int, entered: Tensor, stream: Tensor) -> None:
        found, weight = self.found[layer], 1 / torch.linalg.vector_norm(stream, dim=-1, keepdim=True).clamp_min(1e-20)
        for name, inputs in self._inputs.items():
            weighed = inputs * weight
            self._sum(found.inputs, name, weighed.T @ weighed)
            self._left[layer] = weighed, stream, weight  # the last reader's stays
        added, written = (stream - entered) * weight, self._written.pop(layer) * weight
        products = [(a * b).sum(dtype=torch.float64) for a, b in ((added, added), (added, written), (written, written))]
        found.products += torch.stack(products).cpu()
        self._inputs = {}

    @staticmethod
    def _sum(sums: dict[Any, Tensor], key: Any, value: Tensor) -> None:
        sums[key] = sums[key].add_(value) if key in sums else value


def _normed(selection: Selection, name: str) -> bool:
    """Whether a norm inside the mixer, before a reader, loses channels: what stays is then no longer the parent's."""
    anatomy = selection.anatomy
    spec = anatomy.tensors[name]
    layer = spec.layer or 0
    for path in anatomy.architecture.inner_norms:
        norm = anatomy.tensors.get(f"{anatomy.layer_path(layer)}.{path}.weight")
        if norm is not None and norm.letters <= spec.layout[-1].letters:
            kept = selection.index(norm)[0]
            if kept is not None and len(kept) < norm.layout[0].size(anatomy.sizes(layer)):
                return True
    return False


def _folded(weight: Tensor, inputs: Tensor, kept: Tensor | None, added: Tensor | None, ridge: float) -> Tensor:
    """W with what is lost folded into its kept columns. inputs: S. kept: those columns, None for all. added: D^T."""
    device = inputs.device
    everything = torch.arange(len(inputs), device=device)
    kept = everything if kept is None else kept.to(device)
    pruned = torch.ones_like(everything, dtype=torch.bool).index_fill(0, kept, False)
    wide = inputs.double()
    system = wide[kept][:, kept]
    system.diagonal().add_(ridge * wide.diagonal().mean().clamp_min(1e-300))
    lost = wide[kept][:, pruned] @ weight[:, pruned].double().T
    if added is not None:
        lost += added[kept].double()
    folded = weight.clone()
    folded[:, kept] += torch.linalg.solve(system, lost).T.to(weight.dtype)
    return folded
