"""The loss on text that is never trained on, measured along a training so that one sees it fall.

The loss of a step is that of other text each time, and of a divergence mostly; this is the student's cross-entropy
with the same few rows of the data's validation part each time. It costs a forward pass of the student over a bounded
number of tokens, draws no random numbers and changes nothing, so a run with it ends as a run without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nestling import processes
from nestling.anatomy.bypass import evaluating
from nestling.data import packed_once
from nestling.errors import DataError
from nestling.train.learner import Learner
from nestling.train.rows import IGNORE, shifted
from nestling.train.settings import TrainSettings

MOST_TOKENS = 4096
MOST_TIMES = 20
# A forward pass of the student is at most a quarter of a step, forward and backward with a teacher beside it. Few
# tokens, five times, are the same twentieth of the work as many tokens once, and show more.
PART_OF_TOKENS = 25
LEAST_TIMES = PART_OF_TOKENS // 5
SAMPLE_SEED = 0  # the same rows whatever a run's seed


@dataclass(frozen=True)
class HeldOut:
    """Rows that are not trained on, `[rows, seq]`, and how many steps lie between two measurements on them."""

    rows: Tensor
    every: int

    @torch.no_grad()
    def loss(self, learner: Learner, device: torch.device, rows_at_once: int, of_teacher: bool = False) -> float:
        """Nats per token of the student, or of its teacher: the mean over all rows, shared by all processes."""
        ids, labels = (part.to(device) for part in self._share())
        total = torch.zeros(2, dtype=torch.float64, device=device)
        with evaluating(learner), _measuring(learner):
            for batch, wanted in zip(ids.split(rows_at_once), labels.split(rows_at_once), strict=True):
                total[0] += learner(batch, wanted, of_teacher)
                total[1] += (wanted != IGNORE).sum()
        nats, tokens = processes.summed(total).tolist()
        return float(nats / tokens)

    def _share(self) -> tuple[Tensor, Tensor]:
        """This process's rows and their labels; as many for each, since sharded models run together."""
        count = processes.count()
        labels = shifted(self.rows, torch.ones_like(self.rows, dtype=torch.bool))
        filler = -len(self.rows) % count
        ids = torch.cat([self.rows, self.rows[:1].expand(filler, -1)])
        labels = torch.cat([labels, torch.full_like(labels[:1], IGNORE).expand(filler, -1)])
        return ids[processes.number() % count :: count], labels[processes.number() % count :: count]


class MeasureNow(TrainerCallback):
    """Asks for a measurement every so many steps, and after the last."""

    def __init__(self, every: int):
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            control.should_evaluate = True


def held_out(
    text: Any, tokenizer: PreTrainedTokenizerBase | None, settings: TrainSettings, row_tokens: int, seen: bool
) -> HeldOut | None:
    """What to measure on in a training on that text, or None.

    seen: whether the log is kept; unless settings say how often, nothing is measured without. Raises `DataError` when
    the settings ask for what the data cannot give.
    """
    asked = settings.evaluate_every
    if asked == 0 or (asked is None and not seen):
        return None
    if not isinstance(text, (str, Path)) or tokenizer is None:
        if asked is None:
            return None
        raise DataError(
            f"evaluate_every {asked} needs text that is not trained on, which only text by name has: leave it out, or "
            f"give data by name"
        )
    steps = settings.total_steps(row_tokens)
    total = steps * settings.batch_size * row_tokens
    tokens = min(MOST_TOKENS, max(settings.context, total // PART_OF_TOKENS))
    try:
        rows = packed_once(
            text, tokenizer, context=settings.context, tokens=tokens, split="validation", seed=SAMPLE_SEED
        ).with_format("torch")
    except DataError:
        if asked is None:
            return None
        raise
    times = max(1, min(MOST_TIMES, total * LEAST_TIMES // (tokens * PART_OF_TOKENS)))
    return HeldOut(rows["input_ids"][:].long(), asked or -(-steps // times))


@contextmanager
def _measuring(learner: Learner) -> Iterator[None]:
    """Let a call of the learner measure: what gathers a sharded model is around the call, not around a method."""
    learner.forward = learner.nats  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del learner.forward
        if learner.is_sharded:
            learner.reshard()  # type: ignore[operator]  # nothing goes backward, which would do it
