"""`distill` from end to end on tiny models: that it learns, what it leaves behind, and what it refuses."""

import errno
import json
from dataclasses import fields

import datasets
import pytest
import torch

from nestling.distill import DistillSettings, distill
from nestling.errors import CheckpointError, DataError, NestlingError
from nestling.train import LearnerTrainer
from tests.models import VOCAB, tiny, token_batches


def pair(**overrides):
    return tiny("llama-tied", seed=1, dtype=torch.float32, **overrides), tiny("llama-tied", dtype=torch.float32)


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("states", [[], ["embedding", "output"]], ids=["logits", "states"])
def test_one_batch_can_be_overfitted(tmp_path, states):
    student, teacher = pair(hidden_size=36)
    batch = token_batches(1, batch=4, seq=10)
    distill(student, teacher, batch, steps=60, batch_size=4, learning_rate=3e-2, states=states, run_dir=tmp_path)
    kl = [record["kl"] for record in records(tmp_path)]
    assert kl[-1] < 0.1 * kl[0]


def test_what_it_leaves_behind(tmp_path):
    student, teacher = pair()
    teacher.train()
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student.requires_grad_(False)
    same = distill(student, teacher, token_batches(4, 4), steps=6, batch_size=4, save_every=4, run_dir=tmp_path)
    assert same is student
    assert not student.training
    assert teacher.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*student.modules(), *teacher.modules()])
    found = records(tmp_path)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["tokens"] == 6 * 4 * 12
    assert {"loss", "kl", "ce", "learning_rate", "grad_norm", "elapsed_s"} <= set(found[0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-6"]


def test_split_batch_is_the_same_batch():
    """Rows at once, one by one, or with padding of different lengths in a micro-batch: the same weights."""
    data = []
    for i, batch in enumerate(token_batches(3, 4, 12)):
        mask = torch.ones_like(batch["input_ids"])
        mask[i, 5 + i :] = 0
        data.append(batch | {"attention_mask": mask})
    results = []
    for micro in (4, 1, 2):
        student, teacher = tiny("llama-tied", seed=1), tiny("llama-tied")
        distill(student, teacher, data, steps=3, batch_size=4, micro_batch_size=micro, ce_weight=0.5)
        results.append(dict(student.named_parameters()))
    for name, value in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9)


def test_half_precision_students_train_in_float32_and_come_back(tmp_path):
    student, teacher = tiny("llama", seed=1, dtype=torch.bfloat16), tiny("llama", dtype=torch.bfloat16)
    distill(student, teacher, token_batches(2, 4), steps=2, batch_size=4, save_every=2, run_dir=tmp_path)
    assert {p.dtype for p in [*student.parameters(), *teacher.parameters()]} == {torch.bfloat16}
    config = json.loads((tmp_path / "checkpoints/checkpoint-2/config.json").read_text())
    assert config["dtype"] == "float32"


def test_states_of_a_narrower_student_in_half_precision_are_compared():
    """Its weights are float32 while it trains, and so is the map from its width to the teacher's."""
    student, teacher = (
        tiny("llama", dtype=torch.bfloat16, hidden_size=36, head_dim=8),
        tiny("llama", dtype=torch.bfloat16),
    )
    distill(student, teacher, token_batches(1, 2), steps=1, batch_size=2, states=["embedding", "output"])
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_mixed_precision_runs():
    student, teacher = pair()
    distill(student, teacher, token_batches(2, 4), steps=2, batch_size=4, bf16=True)
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_datasets_are_taken_too():
    rows = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in token_batches(1, 6)[0]["input_ids"]]})
    results = []
    for seed in (0, 0, 1):
        student, teacher = pair()
        distill(student, teacher, rows, steps=2, batch_size=4, seed=seed)
        results.append(student.lm_head.weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_settings_object_and_overrides():
    assert DistillSettings(steps=3).total_steps(10) == 3
    assert DistillSettings(tokens=1000, batch_size=4).total_steps(25) == 10
    documented = DistillSettings.__doc__ or ""
    assert documented.count("    batch_size:") == 1
    assert all(f"{field.name}:" in documented for field in fields(DistillSettings))


@pytest.mark.parametrize(("tokens", "ranks", "batch"), [(24_000, 1, 1), (100_000, 1, 4), (10**7, 1, 8), (24_000, 4, 4)])
def test_short_runs_take_small_batches(monkeypatch, tokens, ranks, batch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert DistillSettings(tokens=tokens).sized().batch_size == batch
    assert DistillSettings(tokens=tokens, batch_size=5).sized().batch_size == 5


@pytest.mark.parametrize(
    ("setting", "value"),
    [("batch_size", -1), ("learning_rate", 0.0), ("tokens", 0), ("temperature", 0.0), ("loss", "kl"), ("warmup", 2.0)],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(NestlingError, match=setting):
        DistillSettings(**{setting: value})


def test_wrong_models_and_data_are_refused(tmp_path):
    student, teacher = pair()
    good = token_batches(1, 4)
    with pytest.raises(NestlingError, match="same model"):
        distill(student, student, good)
    with pytest.raises(DataError, match="97 tokens in its vocabulary and the teacher 101"):
        distill(student, tiny("llama", vocab_size=101, dtype=torch.float32), good)
    with pytest.raises(DataError, match="empty"):
        distill(student, teacher, [])
    with pytest.raises(DataError, match="1 tokens"):
        distill(student, teacher, [{"input_ids": torch.ones(4, 1, dtype=torch.long)}])
    with pytest.raises(DataError, match="needs a tokenizer"):
        distill(student, teacher, "builtin:stdlib")
    with pytest.raises(DataError, match=f"token {VOCAB}, but"):
        distill(student, teacher, [{"input_ids": torch.full((4, 5), VOCAB)}], steps=1, batch_size=4)
    with pytest.raises(DataError, match="no input_ids"):
        distill(student, teacher, datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(DataError, match="cannot be trained on"):
        distill(student, teacher, [torch.ones(4, 5)])
    with pytest.raises(NestlingError, match="micro_batch_size 3"):
        distill(student, teacher, good, batch_size=4, micro_batch_size=3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    student, teacher = pair()
    with torch.no_grad():
        teacher.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NestlingError, match="became nan in step 1"):
        distill(student, teacher, token_batches(1, 4), steps=2, batch_size=4, run_dir=tmp_path)
    assert not student.training


def test_a_disk_that_refuses_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    student, teacher = pair()
    settings = DistillSettings(steps=2, batch_size=4, save_every=1)
    plain = LearnerTrainer._save_rng_state
    monkeypatch.setattr(LearnerTrainer, "_save_rng_state", refuse)
    with pytest.raises(CheckpointError, match="make room"):
        distill(student, teacher, token_batches(1, 4), settings=settings, run_dir=tmp_path)
    monkeypatch.setattr(LearnerTrainer, "_save_rng_state", plain)
    distill(student, teacher, token_batches(1, 4), settings=settings, run_dir=tmp_path)  # what was half there is gone
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be made"):
        distill(student, teacher, token_batches(1, 4), settings=settings, run_dir=tmp_path / "file")
