"""What the kept units can take over from the pruned ones: the matrices that read them, refit by least squares.

A module that reads an axis (`down_proj`, `o_proj`) writes W a for a token's activations a. With the units K kept and P
pruned, a plain cut writes W_K a_K. Where pruned units vary with kept ones, their part need not be lost:

    W_K <- W_K + W_P B        B = S_PK (S_KK + ridge * mean(diag S) I)^-1        S = E[a a^T / ||W a||^2]

is the ridge regression of P on K over calibration tokens, each weighed by what the module writes for it, so that the
few tokens with massive activations do not decide alone. The activations are the parent's. `RIDGE` is strong on
purpose: a weak one fits the calibration text and is worse than a plain cut on other text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestling.anatomy import Anatomy, decoder
from nestling.anatomy.bypass import evaluating
from nestling.errors import DataError
from nestling.surgery.choose import Selection

RIDGE = 1.0
# Bytes of second moments held at once. A model whose moments need more is measured anew for every cut, some layers
# in each pass over the batches.
MOMENTS_BYTES = 4 << 30

Batch = Mapping[str, Tensor]


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
        self._widths = {
            name: model.get_parameter(name).shape[-1]
            for axis in anatomy.axes.values()
            for layer in (range(anatomy.num_layers) if axis.scope == "layer" else ())
            for name in anatomy.places(axis, layer)
        }
        self._kept: dict[str, Tensor] = {}

    def refit(self, selection: Selection) -> dict[str, Tensor]:
        """The parent's reading matrices with the pruned columns folded into the kept ones, ready to be cut."""
        result = {}
        tensors = selection.anatomy.tensors
        columns = {name: selection.index(tensors[name])[-1] for name in self._widths if _stays(name, selection)}
        for name, moments in self._measured([name for name, kept in columns.items() if kept is not None]):
            kept = columns[name]
            assert kept is not None
            result[name] = _folded(self.model.get_parameter(name).detach(), moments, kept, self.ridge)
        return result

    def _measured(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Second moments of what each of these matrices reads; all are measured at once where they fit."""
        if names and not self._kept and _bytes(self._widths.values()) <= MOMENTS_BYTES:
            self._kept = _moments(self.model, list(self._widths), self.batches, self.progress)
        if self._kept:
            yield from ((name, self._kept[name]) for name in names)
        else:
            for group in _groups({name: self._widths[name] for name in names}):
                yield from _moments(self.model, group, self.batches, self.progress).items()


def _stays(name: str, selection: Selection) -> bool:
    return selection.anatomy.tensors[name].layer in selection.form.layers


def _bytes(widths: Iterable[int]) -> int:
    return sum(4 * width**2 for width in widths)


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Matrices whose moments fit in memory together."""
    group: list[str] = []
    for name, width in widths.items():
        if group and _bytes([widths[other] for other in group] + [width]) > MOMENTS_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


@torch.no_grad()
def _moments(
    model: PreTrainedModel, names: list[str], batches: list[Batch], progress: Callable[[int], None] | None
) -> dict[str, Tensor]:
    """Second moments S `[in, in]` of what the matrices read."""
    moments: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            wide = torch.promote_types(output.dtype, torch.float32)  # squares of half precision overflow
            size = torch.linalg.vector_norm(output, dim=-1, keepdim=True, dtype=wide).clamp_min(1e-20)
            share = (args[0].to(wide) / size).flatten(0, -2)
            if mask is not None:
                share = share[mask.flatten()]
            if name not in moments:
                moments[name] = share.new_zeros(share.shape[-1], share.shape[-1])
            moments[name].addmm_(share.T, share)

        return hook

    with ExitStack() as hooks, evaluating(model):
        for name in names:
            module = model.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_hook(record(name)).remove)
        for batch in batches:
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask") if key in batch}
            mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
            decoder(model)(**inputs, use_cache=False)
            if progress is not None:
                progress(inputs["input_ids"].numel())
    return moments


def _folded(weight: Tensor, moments: Tensor, kept: Tensor, ridge: float) -> Tensor:
    kept = kept.to(moments.device)
    pruned = torch.ones(len(moments), dtype=torch.bool, device=moments.device).index_fill(0, kept, False)
    wide = moments.double()
    system = wide[kept][:, kept]
    system.diagonal().add_(ridge * wide.diagonal().mean().clamp_min(1e-300))
    share = torch.linalg.solve(system, wide[kept][:, pruned])  # B^T [kept, pruned]
    folded = weight.clone()
    folded[:, kept] += (weight[:, pruned].double() @ share.T).to(weight.dtype)
    return folded
