"""Settings for every test: one thread (tiny tensors are faster so), no network, one seed."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _imports_are_no_garbage():
    """Trainings collect garbage when they begin and end; most of what that walks is what was imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
