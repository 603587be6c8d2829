"""How far a student goes from where it began to where training ended: the part at which it is best on other text.

A short run moves every weight by as much as noise does, and a step from few tokens is noisy. Between the two ends of
such a run there are students that keep what was learned and lose most of the noise (WiSE-FT, arXiv 2109.01903, which
finds the same for other text than that of the training). A few parts are tried on rows that were not trained on: half
of them held back from the data, half written by the teacher, which stand for all other text. After a long run the
whole way is best, and is what is taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import processes
from nestling.anatomy.bypass import evaluating
from nestling.data import batches
from nestling.data.calibration import written
from nestling.distill.pair import Pair
from nestling.errors import DataError
from nestling.train import collate

PARTS = (0.5, 0.75, 1.0)
ROWS = 4  # of each kind of text
RECORD = "blend.json"  # in the run folder

Weights = Mapping[str, Tensor]


def unseen_rows(pair: Pair, data: str | Path, tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> Tensor:
    """Rows `[rows, context]` that are not trained on, the same in all processes.

    Only the teacher's own where the data holds none back.
    """
    return processes.tensors(lambda: {"rows": _unseen_rows(pair.teacher, data, tokenizer, context, seed)})["rows"]


def weights_of(student: PreTrainedModel) -> Weights:
    """A copy of what training changes, on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in student.named_parameters()}


def blended(pair: Pair, start: Weights, rows: Tensor, run_dir: str | Path | None = None) -> float:
    """Put the student, in place, where its loss on the rows is least between `start` and its weights now.

    Returns the part of the way that it goes, one of `PARTS`.
    """
    end = weights_of(pair.student)
    losses = {part: _loss_at(pair, start, end, part, rows) for part in PARTS}
    best = processes.first(lambda: min(PARTS, key=lambda part: losses[part]))
    _place(pair.student, start, end, best)
    if run_dir is not None and processes.is_first():
        Path(run_dir, RECORD).write_text(json.dumps({"part": best, "losses": losses}, indent=1) + "\n")
    return float(best)


@torch.no_grad()
def _place(student: PreTrainedModel, start: Weights, end: Weights, part: float) -> None:
    """start + part * (end - start), exactly `end` for 1."""
    for name, parameter in student.named_parameters():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        first, last = (weights[name].to(parameter.device, wide) for weights in (start, end))
        parameter.copy_(last if part == 1 else torch.lerp(first, last, part))


@torch.no_grad()
def _loss_at(pair: Pair, start: Weights, end: Weights, part: float, rows: Tensor) -> float:
    """The training loss on the rows, in nats per token, at that part of the way."""
    _place(pair.student, start, end, part)
    make, losses = collate(pair.student.get_output_embeddings().weight.shape[0]), []
    with evaluating(pair.student):
        for row in rows:
            batch: dict[str, Any] = make([{"input_ids": row}])
            losses.append(float(pair(**{k: v.to(pair.student.device) for k, v in batch.items()})["loss"]))
    return sum(losses) / len(losses)


def _unseen_rows(
    teacher: PreTrainedModel | None, data: str | Path, tokenizer: PreTrainedTokenizerBase, context: int, seed: int
) -> Tensor:
    assert teacher is not None, "a blend is measured against the teacher"
    with evaluating(teacher):
        own = written(teacher, tokenizer, ROWS, context, seed)
    try:
        held = batches(data, tokenizer, context=context, tokens=ROWS * context, split="validation")
    except DataError:
        return own
    return torch.cat([*(part["input_ids"] for part in held), own])
