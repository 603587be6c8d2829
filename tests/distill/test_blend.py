"""The way between the student's beginning and the end of training: its ends, its choice, and when it is not gone."""

import json

import pytest
import torch

from nestling.distill import DistillSettings, blend, distill
from nestling.distill.blend import PARTS, RECORD, blended, unseen_rows, weights_of
from nestling.distill.pair import Pair
from tests.checkpoint import tokenizer
from tests.models import tiny, token_batches

CONTEXT = 16


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text that is long enough\n\n" for i in range(400)))
    return path


def pair_at(part, seed=1):
    """A pair whose student ended where the teacher stands at that part of the way from its beginning."""
    teacher, student = tiny("llama-tied", dtype=torch.float64), tiny("llama-tied", seed=seed, dtype=torch.float64)
    start = weights_of(student)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(start[name] + (teacher.get_parameter(name) - start[name]) / part)
    return Pair(student, teacher), start


@pytest.mark.parametrize("part", PARTS)
def test_the_best_part_is_taken(part, tmp_path):
    pair, start = pair_at(part)
    rows = token_batches(1, batch=4, seq=CONTEXT)[0]["input_ids"]
    assert blended(pair, start, rows, tmp_path) == part
    for name, parameter in pair.student.named_parameters():
        torch.testing.assert_close(parameter, pair.teacher.get_parameter(name), rtol=1e-9, atol=1e-9)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["part"] == part
    assert record["losses"][str(part)] == pytest.approx(0, abs=1e-9)
    assert max(record["losses"].values()) > 1e-3


def test_the_whole_way_is_exact():
    pair, start = pair_at(1.0)
    end = weights_of(pair.student)
    assert blended(pair, start, token_batches(1, batch=2, seq=CONTEXT)[0]["input_ids"]) == 1
    assert all(torch.equal(p, end[name]) for name, p in pair.student.named_parameters())


def test_rows_are_held_back_or_the_teachers_own(text):
    pair = Pair(*(tiny("llama-tied", seed=seed, dtype=torch.float32) for seed in (1, 0)))
    rows = unseen_rows(pair, text, tokenizer(), CONTEXT, seed=0)
    assert rows.shape == (2 * blend.ROWS, CONTEXT)
    short = text.with_name("short.txt")
    short.write_text("one document alone, of which nothing is held back")
    assert torch.equal(unseen_rows(pair, short, tokenizer(), CONTEXT, seed=0), rows[blend.ROWS :])


def test_distillation_on_text_blends_unless_told_otherwise(text, tmp_path, monkeypatch):
    monkeypatch.setattr(blend, "PARTS", (0.5,))
    how = {"steps": 3, "batch_size": 2, "context": CONTEXT}
    weights = {}
    for on in (True, False):
        student, teacher = (tiny("llama-tied", seed=seed, dtype=torch.float32) for seed in (1, 0))
        before = weights_of(student)
        distill(student, teacher, text, tokenizer(), DistillSettings(**how, blend=on), tmp_path / str(on))
        weights[on] = weights_of(student)
    assert json.loads((tmp_path / "True" / RECORD).read_text())["part"] == 0.5
    assert not (tmp_path / "False" / RECORD).exists()
    for name, found in weights[True].items():
        torch.testing.assert_close(found, torch.lerp(before[name], weights[False][name], 0.5))


def test_batches_are_trained_on_to_the_end(tmp_path):
    student, teacher = (tiny("llama-tied", seed=seed, dtype=torch.float32) for seed in (1, 0))
    distill(student, teacher, token_batches(2, batch=2), steps=2, batch_size=2, run_dir=tmp_path)
    assert not (tmp_path / RECORD).exists()
