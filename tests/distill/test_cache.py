"""A cached teacher: the live top-k loss to float16 rounding, whole or resumed, and refused when it is another's."""

import json

import pytest
import torch

from nestling.distill import Cache, DistillSettings, distill, teacher_cache
from nestling.errors import CheckpointError, NestlingError
from nestling.train import kept as module
from tests.models import VOCAB, tiny, token_batches


def models():
    return tiny("llama-tied", seed=1, dtype=torch.float32), tiny("llama-tied", dtype=torch.float32)


def how(**overrides):
    return DistillSettings(**({"steps": 3, "batch_size": 4, "top_k": 6, "learning_rate": 1e-3} | overrides))


def trained(cache=None, teacher=True, data=None, **overrides):
    student, live = models()
    data = data or token_batches(2, 4)
    distill(student, live if teacher else None, data, settings=how(**overrides), cache=cache)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


@pytest.mark.parametrize("overrides", [{}, {"remaining_mass": False}, {"temperature": 2.0, "loss": "jensen_shannon"}])
def test_training_from_it_is_training_from_the_live_teacher(tmp_path, overrides):
    start = torch.cat([p.detach().flatten() for p in models()[0].parameters()])
    live = trained(**overrides)
    first, second = (trained(tmp_path / "cache", teacher, **overrides) for teacher in (True, False))
    assert torch.equal(first, second)  # the second student needs no teacher
    assert (first - live).norm() <= 2e-2 * (live - start).norm()
    assert (trained(top_k=2, **overrides) - live).norm() > 5e-2 * (live - start).norm()


def test_what_is_kept_is_what_the_teacher_says(tmp_path):
    _, teacher = models()
    rows = torch.cat([batch["input_ids"] for batch in token_batches(3, 2)])
    mask = torch.ones_like(rows)
    mask[1, 8:] = 0
    data = [{"input_ids": rows, "attention_mask": mask}]
    cache = teacher_cache(teacher, data, None, how(steps=1, batch_size=6), tmp_path, VOCAB)
    assert cache.whole
    assert len(cache) == 6
    with torch.no_grad():
        log_probs = teacher(input_ids=rows, attention_mask=mask).logits.log_softmax(-1)
    for i in range(6):
        row, real = cache[i], mask[i].bool()
        assert torch.equal(row["input_ids"], rows[i].int())
        values, indices = log_probs[i].topk(6)
        assert torch.equal(row["teacher_indices"][real].long(), indices[real])
        torch.testing.assert_close(row["teacher_log_probs"].float()[real], values[real], rtol=2e-3, atol=2e-3)
        rest = torch.log1p(-values.exp().sum(-1))
        torch.testing.assert_close(row["teacher_rest"].float()[real], rest[real], rtol=2e-3, atol=2e-3)
    assert not list(tmp_path.glob(".*"))


def test_an_interrupted_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 12 * 6 * 6 * 3)  # three rows
    _, teacher = models()
    data, plain, calls = token_batches(2, 4), Cache.add, []

    def stop(self, name, tensors):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(name)
        plain(self, name, tensors)

    monkeypatch.setattr(Cache, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        teacher_cache(teacher, data, None, how(), tmp_path / "a", VOCAB)
    assert not Cache.open(tmp_path / "a").whole
    with pytest.raises(CheckpointError, match="not whole: give the teacher"):
        teacher_cache(None, data, None, how(), tmp_path / "a", VOCAB)
    monkeypatch.setattr(Cache, "add", lambda self, name, tensors: (calls.append(name), plain(self, name, tensors)))
    teacher_cache(teacher, data, None, how(), tmp_path / "a", VOCAB)
    assert calls == [f"shard-0000{i}.safetensors" for i in range(3)]
    whole = teacher_cache(teacher, data, None, how(), tmp_path / "b", VOCAB)
    assert Cache.open(tmp_path / "a").shards == whole.shards


def test_anothers_or_a_damaged_one_is_refused(tmp_path):
    student, teacher = models()
    data = token_batches(2, 4)
    teacher_cache(teacher, data, None, how(), tmp_path, VOCAB)
    for other, match in (
        ((teacher, token_batches(2, 4, seed=7), None, how()), "another text"),
        ((student, data, None, how()), "another teacher"),
        ((teacher, data, None, how(top_k=5)), "another top_k"),
        ((teacher, data, None, how(temperature=2.0)), "another temperature"),
    ):
        with pytest.raises(CheckpointError, match=match):
            teacher_cache(*other, tmp_path, VOCAB)
    for wrong, match in (({"top_k": 0}, "say how many"), ({"states": ["output"]}, "intermediate states")):
        with pytest.raises(NestlingError, match=match):
            teacher_cache(teacher, data, None, how(**wrong), tmp_path, VOCAB)
    with pytest.raises(NestlingError, match="needs a model to learn from"):
        distill(student, None, data)
    shard = tmp_path / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or missing"):
        teacher_cache(teacher, data, None, how(), tmp_path, VOCAB)
    (tmp_path / "cache.json").write_text(json.dumps({"rows": 1}))
    with pytest.raises(CheckpointError, match="holds a damaged cache"):
        Cache.open(tmp_path)
