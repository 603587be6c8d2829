"""What every training job shares: settings, rows in a fixed order, checkpoints that are whole, metrics, progress."""

from nestling.train.callbacks import MetricsLog, ShowProgress, StopOnInterrupt
from nestling.train.checkpoints import Seal, clear, fingerprint, newest
from nestling.train.rows import Rows, collate, rows_of
from nestling.train.settings import Split, TrainSettings, documented, split_batch, training_arguments

__all__ = [
    "MetricsLog",
    "Rows",
    "Seal",
    "ShowProgress",
    "Split",
    "StopOnInterrupt",
    "TrainSettings",
    "clear",
    "collate",
    "documented",
    "fingerprint",
    "newest",
    "rows_of",
    "split_batch",
    "training_arguments",
]
