"""Chunks of a scan change its speed, not what it computes, and only where its device is known to want others."""

import pytest
import torch

from nestling.anatomy import compiled_steps, suited_scans
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


@pytest.mark.parametrize("variant", ["nemotron_h", "bamba", "falcon_h1", "mamba2", "zamba2"])
def test_compiled_steps_decode_the_same(variant):
    model, lengths = tiny(variant, dtype=torch.float32), set()
    for module in model.modules():
        if hasattr(module, "A_log"):
            module.register_forward_pre_hook(lambda m, args, more: lengths.add(tokens(args, more)), with_kwargs=True)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    stock = model.generate(IDS[:1], return_dict_in_generate=True, **settings)
    with compiled_steps(model, backend="eager"):
        found = model.generate(IDS[:1], return_dict_in_generate=True, **settings)
    assert torch.equal(found.sequences, stock.sequences)
    for one, other in zip(found.logits, stock.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert lengths == {1, IDS.shape[1]}
    assert not any("forward" in m.__dict__ for m in model.modules())


def tokens(args, more):
    """How many tokens a mixer is given."""
    return (args[0] if args else more["hidden_states"]).shape[1]


def test_steps_are_compiled_and_long_texts_are_not():
    model, called = tiny("nemotron_h", dtype=torch.float32), []

    def backend(graph, inputs):
        called.append(len(inputs))
        return graph.forward

    with compiled_steps(model, backend=backend):
        logits(model, IDS)
        assert not called
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert called
    with compiled_steps(tiny("llama")):
        pass
