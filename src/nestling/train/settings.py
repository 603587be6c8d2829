"""Settings that every training job shares, and their translation into those of `transformers.Trainer`.

A method's own settings inherit from `TrainSettings` and are decorated with `documented`, so that each field is
described once and all of them show in `--help`. Knows nothing of losses or data.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from transformers import TrainingArguments

from nestling.errors import NestlingError

# Tokens that go through the model at once unless `micro_batch_size` says otherwise: a CPU is no faster with more.
MICRO_TOKENS = {"cpu": 256}
MICRO_TOKENS_ELSEWHERE = 8192
# Tokens at once above which activations are recomputed rather than kept.
KEPT_TOKENS = {"cpu": 512}
KEPT_TOKENS_ELSEWHERE = 8192

Settings = TypeVar("Settings", bound=type)


@dataclass
class TrainSettings:
    """Settings of training.

    Args:
        tokens: Tokens to train on, rounded up to whole steps; the data is passed over again when it has fewer.
        steps: Optimizer steps, instead of tokens.
        batch_size: Sequences per optimizer step, over all devices together.
        micro_batch_size: Sequences of them that go through the model at once on one device; the result is the same.
            0 takes as many as fit a size that suits the device.
        context: Tokens per sequence, for data that is text.
        learning_rate: Peak of the learning rate.
        min_lr_ratio: Least learning rate, as a part of the peak; the decay is a cosine whose last step still learns.
        warmup: Part of the steps in which the learning rate rises to its peak.
        weight_decay: AdamW's weight decay.
        beta1: AdamW's first beta.
        beta2: AdamW's second beta.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them alone.
        bf16: Compute in bfloat16 (mixed precision); weights and optimizer stay float32.
        gradient_checkpointing: Recompute activations in the backward pass instead of keeping them: slower, much less
            memory. Unless given, it is on where one micro-batch is longer than suits the device.
        fsdp: Spread weights, gradients, optimizer and teacher over the processes (FSDP2), for models that do not fit
            whole on each device; the result is the same.
        save_every: Steps between checkpoints in the run folder; 0 for none.
        log_every: Steps between records in metrics.jsonl.
        evaluate_every: Steps between measurements of the loss on text that is not trained on, for metrics.jsonl and the
            report; 0 for none. Without a number as often as a twentieth of the time allows, 20 times at most.
        report_to: Experiment tracker that transformers knows (wandb, tensorboard, ...), or none.
        seed: The seed of data order and dropout.
    """

    SMALLEST_BATCH = 1
    # What does not change the result, so that a run may be resumed with others.
    FREE: ClassVar[tuple[str, ...]] = (
        "save_every",
        "log_every",
        "evaluate_every",
        "report_to",
        "micro_batch_size",
        "gradient_checkpointing",
    )

    tokens: int = 100_000
    steps: int | None = None
    batch_size: int = 8
    micro_batch_size: int = 0
    context: int = 256
    learning_rate: float = 3e-4
    min_lr_ratio: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool | None = None
    fsdp: bool = False
    save_every: int = 100
    log_every: int = 1
    evaluate_every: int | None = 0
    report_to: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", self.SMALLEST_BATCH),
            ("micro_batch_size", 0),
            ("context", 2),
            ("save_every", 0),
            ("log_every", 1),
        ):
            if getattr(self, name) < least:
                raise NestlingError(f"{name} {getattr(self, name)} is not possible: give at least {least}")
        if self.evaluate_every is not None and self.evaluate_every < 0:
            raise NestlingError(f"evaluate_every {self.evaluate_every} is not possible: give at least 0")
        if not self.learning_rate > 0:
            raise NestlingError(f"learning_rate {self.learning_rate} is not possible: give a number above 0, say 3e-4")
        amount = "tokens" if self.steps is None else "steps"
        if getattr(self, amount) < 1:
            raise NestlingError(f"{amount} {getattr(self, amount)} is not possible: give at least 1")
        if not (0 <= self.warmup <= 1 and 0 <= self.min_lr_ratio <= 1):
            raise NestlingError(
                f"warmup {self.warmup} and min_lr_ratio {self.min_lr_ratio} are parts: give numbers from 0 to 1"
            )

        if not (self.weight_decay >= 0 and self.max_grad_norm >= 0 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise NestlingError(
                f"weight_decay {self.weight_decay}, max_grad_norm {self.max_grad_norm}, beta1 {self.beta1} and beta2 "
                f"{self.beta2} do not make an AdamW: give no negative number, and betas below 1"
            )
        check_seed(self.seed)

    def total_steps(self, row_tokens: int) -> int:
        """Optimizer steps for rows of that many tokens."""
        return self.steps or -(-self.tokens // (self.batch_size * row_tokens))

    def all_tokens(self) -> int:
        """Tokens that a training on text sees: those of whole steps."""
        return self.total_steps(self.context) * self.batch_size * self.context


def check_seed(seed: int) -> None:
    """Raises `NestlingError` for a seed that not every generator of random numbers takes."""
    if not 0 <= seed < 2**32:
        raise NestlingError(f"seed {seed} is not possible: give a number from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Split:
    """How one step's batch is worked off: `rows` at once on each device, `accumulate` times."""

    rows: int
    accumulate: int
    recompute: bool


def split_batch(settings: TrainSettings, row_tokens: int, device: torch.device) -> Split:
    """Cut a step's batch for the devices there are. Raises `NestlingError` when it does not divide."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    share, rest = divmod(settings.batch_size, ranks)
    if rest:
        raise NestlingError(
            f"batch_size {settings.batch_size} does not divide by {ranks} devices: take {max(1, share) * ranks}"
        )
    most = MICRO_TOKENS.get(device.type, MICRO_TOKENS_ELSEWHERE)
    rows = settings.micro_batch_size or max(n for n in _divisors(share) if n == 1 or n * row_tokens <= most)
    if share % rows:
        raise NestlingError(
            f"micro_batch_size {rows} does not divide the {share} sequences of a device: take one of "
            f"{', '.join(map(str, _divisors(share)))}"
        )
    recompute = settings.gradient_checkpointing
    if recompute is None:
        recompute = rows * row_tokens > KEPT_TOKENS.get(device.type, KEPT_TOKENS_ELSEWHERE)
    return Split(rows, share // rows, recompute)


def training_arguments(
    settings: TrainSettings, split: Split, steps: int, folder: Path, device: torch.device, measured: bool = False
) -> TrainingArguments:
    """What `Trainer` is told; folder: where checkpoints go; measured: whether it begins with a measurement."""
    on_cpu = device.type == "cpu" and not ("LOCAL_RANK" in os.environ and torch.cuda.is_available())
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=split.rows,
        gradient_accumulation_steps=split.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_warmup_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": max(settings.min_lr_ratio, _last_rate(steps))},
        warmup_steps=int(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        eval_on_start=measured,
        report_to=settings.report_to,
        seed=settings.seed,
        use_cpu=on_cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several devices are used through torchrun, not DataParallel
    return arguments


def documented(settings: Settings) -> Settings:
    """Put the field descriptions of the class a settings class inherits from before its own, which replace them."""
    own, _, fields = inspect.cleandoc(settings.__doc__ or "").partition("Args:\n")
    base = inspect.cleandoc(settings.__base__.__doc__ or "").partition("Args:\n")[2]
    inherited = re.split(r"\n(?=    \w+:)", base.rstrip())
    kept = [text for text in inherited if f"\n{text.partition(':')[0]}:" not in f"\n{fields}"]
    settings.__doc__ = "\n".join([f"{own}Args:", *kept, fields])
    return settings


def _last_rate(steps: int) -> float:
    """What a cosine that comes to nothing after the last step leaves for it, as a part of the peak."""
    return 0.5 * (1 - math.cos(math.pi / (steps + 1)))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
