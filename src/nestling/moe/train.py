"""Training of mixtures of experts: language modelling, and what keeps routers useful.

`MixtureLM` is a `Learner`; the loop is `nestling.train.fit`. Routers are watched and, where the settings say so, guided
through hooks while a batch runs: float32 routing, balance and z-losses, a capacity, and the selection bias of routers
that have one (aux-loss-free balancing, arXiv 2408.15664). Order of softmax and top-k, granularity and sizes are the
config's (`mixture_config`). Defaults are what the literature settled on; see docs/moe.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling import processes
from nestling.anatomy import Anatomy, decoder
from nestling.anatomy.bypass import evaluating
from nestling.anatomy.declare import Routed
from nestling.anatomy.routing import BIAS
from nestling.errors import NestlingError
from nestling.experts import use_fast_experts
from nestling.moe.routers import Call, balance_loss, health, over_capacity, sequence_balance_loss, z_loss
from nestling.train import (
    CROSS_ENTROPY,
    IGNORE,
    Learner,
    TrainSettings,
    documented,
    fit,
    model_inputs,
    own_dtype,
)

LEVELS = ("global", "batch", "sequence")


@documented
@dataclass
class MixtureSettings(TrainSettings):
    """Settings of training a mixture of experts.

    Args:
        balance: Coefficient of the load-balancing loss; it equals the coefficient when the load is even.
        balance_over: What the load is counted over: global (all of a step's tokens so far, on all devices), batch (one
            micro-batch) or sequence.
        z_loss: Coefficient of the router's z-loss.
        bias_rate: Step of the selection bias instead of a balance loss, for routers that have one (DeepSeek-V3,
            Nemotron-H): 1e-3 is usual; 0 leaves it alone.
        capacity: Slots that an expert takes, as a multiple of an even share; 0 drops none.
        float32_routers: Compute router logits in float32 under mixed precision.
        init_scale: Fresh experts' down projections are multiplied by it before training; trained ones should keep 1.
    """

    tokens: int = 2_000_000
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    balance: float = 1e-2
    balance_over: str = "global"
    z_loss: float = 1e-3
    bias_rate: float = 0.0
    capacity: float = 0.0
    float32_routers: bool = True
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance_over not in LEVELS:
            raise NestlingError(f"balance_over '{self.balance_over}' is not known: choose from {', '.join(LEVELS)}")
        for name in ("balance", "z_loss", "bias_rate", "capacity"):
            if getattr(self, name) < 0:
                raise NestlingError(f"{name} {getattr(self, name)} is not possible: give 0 or more")


def train(
    model: PreTrainedModel,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: MixtureSettings | None = None,
    run_dir: str | Path | None = None,
    resume: bool = True,
    **overrides: Any,
) -> PreTrainedModel:
    """Train a mixture of experts, in place, on text; returns it in eval mode.

    model: fresh weights, or upcycled or pruned ones. data, run_dir, resume: as `nestling.train.fit` takes them.
    overrides: single settings, such as `balance=0.02`. `metrics.jsonl` gets the losses of the routers and how even
    their load is. Raises `NestlingError` for a model without routed experts, or without the bias that bias_rate moves.
    """
    settings = dataclasses.replace(settings or MixtureSettings(), **overrides)
    set_seed(settings.seed)
    learner = MixtureLM(use_fast_experts(model), settings)
    if settings.init_scale != 1:
        scale_experts(model, settings.init_scale)
    with learner.guided():
        fit(learner, data, tokenizer, settings, run_dir, resume)
    return model


def scale_experts(model: PreTrainedModel, factor: float) -> None:
    """Multiply the down projections of all experts, in place: what `init_scale` does to fresh ones."""
    with torch.no_grad():
        for _, _, experts in routed_modules(model):
            experts.get_parameter("down_proj").mul_(factor)


def fresh_scale(
    num_experts: int, num_experts_per_tok: int, granularity: int = 1, normalized: bool = True, shared: int = 0
) -> float:
    """The factor for fresh experts with which granularity and router order leave the size of the block's output alone.

    Weights of one spread make what an expert of 1/g of the width writes smaller by the root of g, and averaging g times
    as many such experts does so once more. Weights from the softmax over all sum to k/E at first, not to 1. Parts of
    the FFN that are shared are not among those averaged, and what they write is left alone.
    """
    spread = (granularity * (granularity - shared)) ** 0.5
    return spread * (1.0 if normalized else num_experts / num_experts_per_tok)


class MixtureLM(Learner):
    """Next-token cross-entropy, plus the losses of the routers, which are watched within `guided`."""

    loads: Tensor

    def __init__(self, model: PreTrainedModel, settings: MixtureSettings):
        super().__init__(model)
        self.settings = settings
        self._routers = [router for _, router, _ in routed_modules(model)]
        if settings.bias_rate and not all(hasattr(router, BIAS) for router in self._routers):
            raise NestlingError(
                f"bias_rate={settings.bias_rate} moves a selection bias, which routers of a {model.config.model_type} "
                f"model do not have: set it to 0 and let balance do the work"
            )
        widest = max(len(next(router.parameters())) for router in self._routers)
        self.register_buffer("loads", torch.zeros(len(self._routers), widest))  # slots of each expert, this step
        self._calls: list[Call] | None = None
        self._batch = (torch.zeros(0), 0)
        self._health: dict[str, float] = {}

    @contextmanager
    def guided(self) -> Iterator[MixtureLM]:
        """Within this context routers are guided, also where the backward pass computes a layer again."""
        with ExitStack() as hooks:
            for number, router in enumerate(self._routers):
                hooks.callback(router.register_forward_hook(self._guide(number)).remove)
            yield self

    def begin(self, step: int, steps: int) -> None:
        """Note how even the last step's load was, move the selection biases by it, and count anew."""
        loads = processes.summed(self.loads)
        if loads.sum():
            counts = [load[: len(next(r.parameters()))] for load, r in zip(loads, self._routers, strict=True)]
            self._health = health(counts)
            if self.settings.bias_rate:
                self._move_biases(counts)
        self.loads.zero_()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """See `Learner.forward`; also `balance` and `z` without their coefficients, and the last step's load."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        calls: list[Call] = []
        self._batch = (real.flatten().float(), len(input_ids))
        self._calls = calls
        try:
            hidden = decoder(self.student)(**model_inputs(input_ids, attention_mask)).last_hidden_state
        finally:
            self._calls = None
        assert calls, "routers are watched within guided()"
        losses = self.logit_losses(hidden, labels, CROSS_ENTROPY, None, num_items_in_batch)
        share = 1.0 if num_items_in_batch is None else (labels != IGNORE).sum() / num_items_in_batch
        balance = self._balance(calls) * share
        z = torch.stack([z_loss(call) for call in calls]).mean() * share
        found = {"balance": balance.detach(), "z": z.detach()}
        figures = self._health | ({"dropped": _dropped(calls)} if self.settings.capacity else {})
        found |= {name: torch.as_tensor(value * share, device=hidden.device) for name, value in figures.items()}
        total = losses.loss + self.settings.balance * balance + self.settings.z_loss * z
        return {"loss": total, "ce": losses.cross_entropy, **found}

    def _balance(self, calls: list[Call]) -> Tensor:
        if self.settings.balance_over == "sequence":
            return torch.stack([sequence_balance_loss(call) for call in calls]).mean()
        if self.settings.balance_over == "batch":
            return torch.stack([balance_loss(call) for call in calls]).mean()
        counts = processes.summed(self.loads)
        pairs = zip(calls, counts, strict=True)
        return torch.stack([balance_loss(call, count[: call.logits.shape[-1]]) for call, count in pairs]).mean()

    def _move_biases(self, counts: list[Tensor]) -> None:
        for router, count in zip(self._routers, counts, strict=True):
            bias = getattr(router, BIAS)
            step = self.settings.bias_rate * (count.mean() - count).sign()
            bias.add_((step - step.mean()).to(bias))

    def _guide(self, number: int) -> Callable[..., Any]:
        def hook(router: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            if self.settings.float32_routers and torch.is_autocast_enabled(args[0].device.type):
                with own_dtype(args[0]):
                    output = type(router).forward(router, args[0].float())
            logits, weights, index = output
            dropped = None
            if self.settings.capacity:
                dropped = over_capacity(index, logits.shape[-1], self.settings.capacity)
                weights = weights.masked_fill(dropped, 0)
            if self._calls is not None:
                real, rows = self._batch
                call = Call(logits, index, real, rows, dropped, sigmoid=hasattr(router, BIAS))
                self._calls.append(call)
                with torch.no_grad():
                    self.loads[number, : logits.shape[-1]] += call.counts()
            return logits, weights, index

        return hook


def routed_modules(model: PreTrainedModel) -> Iterator[tuple[int, nn.Module, nn.Module]]:
    """Layer, router and experts of each layer that has them. Raises `NestlingError` for a model without."""
    anatomy = Anatomy.of(model)
    routed = check_routed(anatomy)
    for layer in anatomy.routed_layers():
        path = anatomy.layer_path(layer)
        yield layer, model.get_submodule(f"{path}.{routed.router}"), model.get_submodule(f"{path}.{routed.experts}")


def check_routed(anatomy: Anatomy) -> Routed:
    """Where layers have their routed experts. Raises `NestlingError` for a model without."""
    routed = anatomy.architecture.routed
    if routed is None or not anatomy.routed_layers():
        raise NestlingError(
            f"this {anatomy.architecture.model_type} model has no routed experts: make some with nestling moe upcycle"
        )
    return routed


def loads(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """How many slots each expert gets on some text, for each layer with experts `[experts]`."""
    modules = list(routed_modules(model))
    totals = [torch.zeros(len(next(router.parameters())), dtype=torch.float64) for _, router, _ in modules]
    with ExitStack() as hooks, evaluating(model):
        for total, (_, router, _) in zip(totals, modules, strict=True):
            hooks.callback(router.register_forward_hook(_counting(total)).remove)
        for batch in batches:
            decoder(model)(input_ids=batch["input_ids"].to(model.device), use_cache=False)
    return totals


def _counting(total: Tensor) -> Callable[..., None]:
    def hook(router: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        total.add_(torch.bincount(output[2].flatten(), minlength=len(total)).cpu())

    return hook


def _dropped(calls: list[Call]) -> float:
    """Part of the slots that found their expert full."""
    parts = [call.dropped[call.real > 0].float().mean() for call in calls if call.dropped is not None]
    return torch.stack(parts).mean().item()
