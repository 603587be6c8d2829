"""Speed: what is measured and in which order, not how fast this machine is."""

import sys

import pytest

from nestling import evaluate
from nestling.errors import DataError
from tests.models import tiny


def test_models_take_turns_and_the_median_is_reported(monkeypatch):
    models = {"parent": tiny("llama"), "child": tiny("qwen3")}
    order, seconds, slowness = [], {"parent": 1.0, "child": 0.5}, [100, 1, 4, 2]  # per round; the first warms up

    def measure(model, prompt, new_tokens):
        name = "parent" if model is models["parent"] else "child"
        order.append(name)
        return seconds[name] * slowness[(len(order) - 1) // 2], seconds[name]

    monkeypatch.setattr(sys.modules["nestling.evaluate.speed"], "_measure", measure)
    done = []
    found = evaluate.speed(models, prompt_tokens=8, new_tokens=4, batch=2, rounds=3, progress=done.append)
    assert order == ["parent", "child", "child", "parent"] * 2
    assert found["parent"].prefill_tokens_per_s == 16 / 2
    assert found["child"].prefill_tokens_per_s == 16
    assert found["parent"].prefill_range == (4, 16)
    assert found["child"].decode_tokens_per_s == 16
    assert sum(done) == 4


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "nemotron"])
def test_a_real_model_is_run_for_a_prompt_and_every_new_token(variant):
    model, lengths = tiny(variant).train(), []
    model.register_forward_pre_hook(lambda _, __, k: lengths.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    found = evaluate.speed({"m": model}, prompt_tokens=7, new_tokens=3, batch=2, rounds=2, warmup=0)["m"]
    assert lengths == [(2, 7), (2, 1), (2, 1), (2, 1)] * 2
    assert (found.prompt_tokens, found.new_tokens, found.batch, found.rounds) == (7, 3, 2, 2)
    assert found.decode_range[0] <= found.decode_tokens_per_s <= found.decode_range[1]
    assert model.training


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "rounds"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(DataError, match=f"{name} 0"):
        evaluate.speed({"m": tiny("llama")}, **{name: 0})
