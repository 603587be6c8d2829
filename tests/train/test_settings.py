"""How a step's batch is cut for the devices there are, and how settings are checked and documented."""

from dataclasses import dataclass, fields

import pytest
import torch

from nestling.errors import NestlingError
from nestling.train import Split, TrainSettings, documented, split_batch
from nestling.train.settings import KEPT_TOKENS, MICRO_TOKENS

CPU = torch.device("cpu")
MOST = MICRO_TOKENS["cpu"]


def test_split_takes_the_most_rows_that_fit():
    assert split_batch(TrainSettings(batch_size=12), MOST // 4, CPU) == Split(4, 3, recompute=False)
    assert split_batch(TrainSettings(batch_size=12), KEPT_TOKENS["cpu"] + 1, CPU) == Split(1, 12, recompute=True)
    assert split_batch(TrainSettings(batch_size=3), 2, CPU) == Split(3, 1, recompute=False)


def test_split_obeys():
    settings = TrainSettings(batch_size=12, micro_batch_size=6, gradient_checkpointing=False)
    assert split_batch(settings, MOST, CPU) == Split(6, 2, recompute=False)
    with pytest.raises(NestlingError, match="micro_batch_size 5 does not divide the 12"):
        split_batch(TrainSettings(batch_size=12, micro_batch_size=5), 8, CPU)


def test_split_over_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert split_batch(TrainSettings(batch_size=12), 8, CPU) == Split(3, 1, recompute=False)
    with pytest.raises(NestlingError, match="batch_size 10 does not divide by 4 devices: take 8"):
        split_batch(TrainSettings(batch_size=10), 8, CPU)


def test_every_field_is_described_once():
    @documented
    @dataclass
    class Own(TrainSettings):
        """Settings of mine.

        Args:
            more: More of it.
        """

        more: int = 1

    text = Own.__doc__ or ""
    assert text.startswith("Settings of mine.")
    assert all(text.count(f" {field.name}:") == 1 for field in fields(Own))


def test_tokens_of_a_training_are_those_of_whole_steps():
    """Also where steps were given, whatever the tokens that nobody asked for are by default."""
    size = {"batch_size": 3, "context": 40}
    assert TrainSettings(tokens=500, **size).all_tokens() == 600
    assert TrainSettings(steps=2, **size).all_tokens() == 240
