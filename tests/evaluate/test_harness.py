"""lm-eval on a task of our own with local data, without a network."""

import builtins
import functools
import json

import pytest

from nestling import evaluate
from nestling.errors import DataError, NestlingError
from tests.data import toy
from tests.models import tiny

TASK = """
task: toy_pairs
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""
PAIRS = [("the fox jumps", "the fox jump over"), ("the lazy dog", "dog"), ("a dog is here", "a dog are here")]


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    only_ours = functools.partial(tasks.TaskManager, include_defaults=False)  # indexing thousands takes a while
    monkeypatch.setattr(tasks, "TaskManager", only_ours)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK.format(file=tmp_path / "pairs.jsonl"))
    return tmp_path


def test_a_local_task_agrees_with_our_minimal_pairs(task_folder):
    model, tokenizer = tiny("llama", vocab_size=toy.VOCAB).float(), toy.tokenizer()
    found = evaluate.harness(model, tokenizer, "toy_pairs", include_path=task_folder)
    ours = evaluate.minimal_pairs(model, tokenizer, task_folder / "pairs.jsonl")
    assert found["toy_pairs"]["acc,none"] == pytest.approx(ours.accuracy)


def test_unknown_tasks_are_named(task_folder):
    with pytest.raises(DataError, match="no task 'no_such_task'"):
        evaluate.harness(tiny("llama"), toy.tokenizer(), ["no_such_task"], include_path=task_folder)


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NestlingError, match=r'pip install "nestling\[eval\]"'):
        evaluate.harness(tiny("llama"), toy.tokenizer(), "hellaswag")
