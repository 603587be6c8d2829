"""Successive halving: finalists are trained briefly, and the better half again for longer.

The order of shapes before training is not their order after it (Minitron, arXiv 2407.14679, table 1), and settles
after a few hundred steps (figure 9), so a little training is worth more than any score of an untrained child.
Paper: arXiv 1502.07943.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from nestling.search.candidate import Candidate, Loss, Losses, describe, finite_or_last


@dataclass(frozen=True)
class Trial:
    """Short training of the finalists.

    train: a child and a number of tokens -> the trained child. loss: of a trained child, on text that was held back.
    tokens: for each finalist in the first round; doubled in every round after it.
    """

    train: Callable[[PreTrainedModel, int], PreTrainedModel]
    loss: Loss
    tokens: int


def halve(candidates: list[Candidate], trial: Trial, measured: Losses) -> list[Candidate]:
    """Successive halving: all are trained, the better half again for twice as long, until one is left.

    Every round starts from the pruned weights, so each schedule is complete and a round that was measured is never
    needed again. Returns all, best first: those that lasted longest, then by the loss they reached.
    """
    alive, tokens = list(candidates), trial.tokens
    done: list[Candidate] = []
    while len(alive) > 1:
        measured.plan((f"{describe(one.shape)}{_for(tokens)}" for one in alive), more=_later(len(alive)))
        alive = _by_trained(_trained(one, trial, measured, tokens) for one in alive)
        keep = len(alive) // 2
        done, alive, tokens = alive[keep:] + done, alive[:keep], 2 * tokens
    return alive + done


def _trained(one: Candidate, trial: Trial, measured: Losses, tokens: int) -> Candidate:
    def measure() -> float:
        return trial.loss(trial.train(measured.build(one.shape), tokens))

    loss = measured.kept(one.shape, _for(tokens), measure)
    return replace(one, trained_loss=loss, trained_tokens=tokens)


def _for(tokens: int) -> str:
    return f" with {tokens} tokens of training"


def _later(count: int) -> int:
    """Trainings in the rounds after one of so many candidates."""
    half = count // 2
    return half + _later(half) if half > 1 else 0


def _by_trained(candidates: Iterable[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda one: finite_or_last(one.trained_loss))
