"""Chunks of a scan change its speed, not what it computes, and only where its device is known to want others."""

import pytest
import torch

from nestling.anatomy import suited_scans
from nestling.anatomy.scan import CHUNK
from tests.models import in_float64, logits, tiny, token_batches

IDS = token_batches(1, seq=23)[0]["input_ids"]


@pytest.mark.parametrize("chunk", [1, 4, 8, 32, 128])
def test_the_function_is_the_same_for_any_chunk(chunk, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", chunk)
    with in_float64():
        model = tiny("nemotron_h", chunk_size=256)
        before = logits(model, IDS)
        with suited_scans(model):
            torch.testing.assert_close(logits(model, IDS), before, rtol=1e-10, atol=1e-10)


def test_chunks_are_put_back_and_small_ones_left_alone():
    models = {chunk: tiny("mamba2", chunk_size=chunk) for chunk in (8, 256)}
    for chunk, model in models.items():
        mixer = model.backbone.layers[0].mixer
        with suited_scans(model):
            assert mixer.chunk_size == min(chunk, CHUNK["cpu"])
        assert mixer.chunk_size == model.config.chunk_size == chunk
    with suited_scans(tiny("llama")):
        pass
