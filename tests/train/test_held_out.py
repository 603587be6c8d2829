"""The loss on held-out text: what it is, on what, how often, and that it changes nothing."""

import json
import math

import datasets
import pytest
import torch
import torch.nn.functional as F

from nestling.data import packed
from nestling.distill import distill
from nestling.errors import DataError, NestlingError
from nestling.train import TrainSettings
from nestling.train.held_out import LEAST_TIMES, MOST_TIMES, MOST_TOKENS, HeldOut, held_out
from tests import checkpoint
from tests.models import tiny, token_batches
from tests.several import together

CONTEXT = 16
HOW = {"steps": 6, "batch_size": 2, "context": CONTEXT, "learning_rate": 1e-2, "save_every": 3, "evaluate_every": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(checkpoint.write_text(tmp_path_factory.mktemp("text") / "text.jsonl"))


def models(dropout=0.0):
    student = tiny("llama-tied", seed=1, hidden_size=36, attention_dropout=dropout)
    return student, tiny("llama-tied", seed=0)


def distilled(text, run_dir=None, dropout=0.0, **overrides):
    student, teacher = models(dropout)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = dropout
    distill(student, teacher, text, checkpoint.tokenizer(), run_dir=run_dir, **(HOW | overrides))
    return {name: p.detach().clone() for name, p in student.named_parameters()}


def measured(run_dir, name="eval_loss"):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record}


def rows_of(text, tokens=CONTEXT, split="validation"):
    rows = packed(text, checkpoint.tokenizer(), context=CONTEXT, tokens=tokens, split=split)
    return torch.tensor(rows["input_ids"][:])


@torch.no_grad()
def plain(model, rows):
    logits = model(input_ids=rows).logits[:, :-1].double()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_it_is_the_cross_entropy_with_text_that_is_not_trained_on(text, tmp_path):
    weights = distilled(text, tmp_path / "run")
    (student, teacher), rows = models(), rows_of(text)
    found = measured(tmp_path / "run")
    assert list(found) == [0, 2, 4, 6]
    assert found[0] == pytest.approx(plain(student, rows), rel=1e-6)
    student.load_state_dict(weights, strict=False)
    assert found[6] == pytest.approx(plain(student, rows), rel=1e-6)
    assert found[6] < found[0]
    assert measured(tmp_path / "run", "eval_teacher_loss") == {0: pytest.approx(plain(teacher, rows), rel=1e-6)}
    trained = {tuple(row.tolist()) for row in rows_of(text, tokens=None, split="train")}
    assert not any(tuple(row.tolist()) in trained for row in rows)
    assert found[0] != pytest.approx(plain(models()[0], rows_of(text, split="train")), rel=1e-4)  # negative control


def test_a_run_that_is_measured_ends_as_one_that_is_not(text, tmp_path):
    """With dropout, so that random numbers count."""
    expected = distilled(text, dropout=0.2, evaluate_every=0)
    torch.testing.assert_close(distilled(text, tmp_path, dropout=0.2, evaluate_every=1), expected, rtol=0, atol=0)
    other = distilled(text, dropout=0.2, evaluate_every=0, seed=1)  # negative control
    assert any(not torch.equal(other[name], value) for name, value in expected.items())


def test_an_interrupted_run_measures_the_same_and_may_change_how_often(text, tmp_path, monkeypatch):
    whole = distilled(text, tmp_path / "whole")

    def stop(self, learner, *how, **more):
        if len(measured(tmp_path / "run")) == 2:
            raise KeyboardInterrupt
        return loss(self, learner, *how, **more)

    loss = HeldOut.loss
    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            distilled(text, tmp_path / "run")
    torch.testing.assert_close(distilled(text, tmp_path / "run"), whole, rtol=0, atol=0)
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    distilled(text, tmp_path / "run", evaluate_every=5)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_measure_what_one_does(text, tmp_path, fsdp):
    """Three rows, so that one process has one more than the other."""
    how = {"tokens": 75 * 3 * CONTEXT, "steps": None, "batch_size": 150, "evaluate_every": 1, "save_every": 0}
    how["gradient_checkpointing"] = False
    distilled(text, tmp_path / "one", **how)
    expected = measured(tmp_path / "one")
    assert sorted(expected) == [0, 1, 2]
    for weights in together(2, tmp_path, lambda: distilled(text, tmp_path / "two", fsdp=fsdp, **how)):
        assert weights
    assert measured(tmp_path / "two") == pytest.approx(expected, rel=1e-6)
    both = [measured(tmp_path / name, "eval_teacher_loss")[0] for name in ("one", "two")]
    assert both[0] == pytest.approx(both[1], rel=1e-6)


def test_a_cache_of_the_teacher_leaves_the_text_to_measure_on(text, tmp_path):
    how = {"top_k": 8, "cache": tmp_path / "cache"}
    distilled(text, tmp_path / "run", **how)
    assert measured(tmp_path / "run")[0] == pytest.approx(plain(models()[0], rows_of(text)), rel=1e-6)


# ---- when


def asked(text, every, seen=True, **settings):
    how = TrainSettings(context=CONTEXT, batch_size=2, evaluate_every=every, **settings)
    return held_out(text, checkpoint.tokenizer(), how, CONTEXT, seen)


def test_unless_told_it_is_measured_where_it_is_seen(text, tmp_path):
    assert asked(text, None) is not None
    assert asked(text, None, seen=False) is None
    assert asked(text, 0) is None
    assert asked(text, 3, seen=False).every == 3
    distilled(text, tmp_path, evaluate_every=None)
    assert set(measured(tmp_path)) == {0, 3, 6}


@pytest.mark.parametrize("data", [token_batches(1), datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]]})])
def test_data_without_held_out_text_is_not_measured_on(data, tmp_path):
    assert asked(data, None) is None
    with pytest.raises(DataError, match="evaluate_every 3 needs text that is not trained on"):
        asked(data, 3)
    (tmp_path / "one.txt").write_text("one document is all there is " * 9)
    assert asked(str(tmp_path / "one.txt"), None) is None
    with pytest.raises(DataError, match="has no text for the split 'validation'"):
        asked(str(tmp_path / "one.txt"), 3)
    with pytest.raises(NestlingError, match="evaluate_every -1 is not possible"):
        asked(data, -1)


@pytest.mark.parametrize("tokens", [32, 5_000, 20_000, 10**6, 10**9])
def test_it_costs_a_twentieth_of_the_tokens_at_most(tokens, tmp_path):
    """A token that is measured costs a quarter of one that is trained on; one row and one time are the least."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a model reads " * 4000}) + "\n")
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one after another " * 4000}) + "\n")
    found = asked(str(tmp_path / "text.jsonl"), None, tokens=tokens)
    steps = TrainSettings(tokens=tokens, batch_size=2).total_steps(CONTEXT)
    times = math.ceil(steps / found.every)
    assert 1 <= times <= MOST_TIMES
    assert found.rows.numel() <= MOST_TOKENS
    assert found.rows.numel() * times / 4 <= max(tokens / 20 * 1.05, CONTEXT)
    assert times >= LEAST_TIMES or tokens < 25 * CONTEXT
