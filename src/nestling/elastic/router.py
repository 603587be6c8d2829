"""The router: from a budget to how much each size of each axis is wanted.

One small network per axis, `z = W2 leaky_relu(W1 onehot(budget))`, for all its decisions at once; no token is looked
at. Paper: Nemotron Elastic, arXiv 2511.16664, section 3.3 (Gumbel-softmax, equations 10 and 11); slope, initial
spread and the lack of biases follow the code that was released with it. What becomes of the logits is in `target`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.elastic.space import PerChoice, Space
from nestling.errors import NestlingError

MASKS = ("soft", "straight_through", "hard")
SLOPE = 0.1
SPREAD = 0.1
TRUST = 50.0  # logits for a nat of loss that was measured


class Router(nn.Module):
    """Logits of every choice for each budget: what a small network has learned, on top of what was known before.

    losses: for each budget what every choice is expected to lose `[rows, choices]`, in nats; see `prior`.
    seed: of the initial weights; the generator that everything else uses is left alone.
    """

    def __init__(
        self,
        space: Space,
        losses: Sequence[PerChoice],
        width: int = 128,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        budgets = len(losses)
        self._shapes = {field: tuple(knob.sizes.shape) for field, knob in space.knobs.items()}
        generator = torch.Generator().manual_seed(seed)

        def weight(*size: int) -> nn.Parameter:
            return nn.Parameter(SPREAD * torch.randn(*size, generator=generator).to(dtype))

        for field in self._shapes:
            known = -TRUST * torch.stack([loss[field] for loss in losses])
            self.register_buffer(f"known_{field}", known)
        self.inner = nn.ParameterDict({field: weight(width, budgets) for field in self._shapes})
        self.outer = nn.ParameterDict({f: weight(rows * choices, width) for f, (rows, choices) in self._shapes.items()})

    def forward(self, budget: int, scale: float = 1.0) -> dict[str, Tensor]:
        """Logits `[rows, choices]` for each knob, what was learned times the schedule's scale."""
        known = self.known(budget)
        learned = {f: self.outer[f] @ F.leaky_relu(self.inner[f][:, budget], SLOPE) for f in self._shapes}
        return {field: known[field] + scale * learned[field].view(self._shapes[field]) for field in self._shapes}

    def known(self, budget: int) -> dict[str, Tensor]:
        """The part of the logits that nothing has been learned for: `[rows, choices]` for each knob."""
        return {field: getattr(self, f"known_{field}")[budget] for field in self._shapes}


@dataclass(frozen=True)
class Schedule:
    """Temperature and scale of the logits while the router learns: tau falls geometrically, the scale rises evenly."""

    tau: tuple[float, float] = (1.0, 0.05)
    scale: tuple[float, float] = (1.0, 10.0)

    def at(self, done: float) -> tuple[float, float]:
        """(tau, scale) when that part of the routing, from 0 to 1, is done."""
        tau = self.tau[0] * (self.tau[1] / self.tau[0]) ** done
        return tau, self.scale[0] + (self.scale[1] - self.scale[0]) * done


def gumbel(space: Space, seed: int, step: int, budget: int) -> dict[str, Tensor]:
    """Gumbel(0, 1) noise `[rows, choices]` for each knob, a function of its arguments alone."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_009 + budget) % 2**63)
    noise = {}
    for field, knob in space.knobs.items():
        uniform = torch.rand(knob.sizes.shape, generator=generator, dtype=torch.float64)
        noise[field] = -(-uniform.clamp(1e-12, 1 - 1e-12).log()).log()
    return noise


def relaxed(chances: PerChoice, masks: str) -> dict[str, Tensor]:
    """What is put into the forward pass for the chances `[rows, choices]`.

    soft: the chances (equation 51). straight_through: the likeliest choice, with the gradient of the chances. hard: the
    likeliest choice times its chance over itself, so that only its own logit learns (equation 50, with the chance in
    place of the printed logit, as the released code has it).
    """
    if masks not in MASKS:
        raise NestlingError(f"masks '{masks}' are not known: choose from {', '.join(MASKS)}")
    if masks == "soft":
        return dict(chances)
    result = {}
    for field, value in chances.items():
        best = F.one_hot(value.argmax(-1), value.shape[-1]).to(value.dtype)
        result[field] = best + value - value.detach() if masks == "straight_through" else best * value / value.detach()
    return result
