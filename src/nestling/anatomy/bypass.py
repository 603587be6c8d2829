"""What is done to a model for a while: a layer taken out of its forward pass, evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def bypassed(
    layer: nn.Module, substitute: Callable[[Tensor], Tensor] = lambda hidden: hidden, as_tuple: bool = False
) -> Iterator[None]:
    """Within this context the layer is not computed: it returns `substitute(hidden)`, its input unless given.

    hidden: `[batch, seq, hidden]`. as_tuple: the layer returns its hidden state in a tuple (`Anatomy.bypassed` knows).
    """

    def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        hidden = substitute(args[0] if args else kwargs["hidden_states"])
        return (hidden, None) if as_tuple else hidden

    layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        layer.__dict__.pop("forward", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
