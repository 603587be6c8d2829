"""Teacher correction: the copy learns the text, the teacher that was given does not change, a stopped run goes on."""

import pytest
import torch

from nestling.distill import DistillSettings, Pair, Together, corrected, distill
from nestling.errors import NestlingError
from nestling.train import CausalLM, LearnerTrainer, Objective
from tests.models import tiny, token_batches


def models():
    return tiny("llama-tied", seed=1, dtype=torch.float32), tiny("llama-tied", dtype=torch.float32)


def how(**overrides):
    values = {"steps": 4, "batch_size": 4, "learning_rate": 5e-3, "save_every": 1, "warmup": 0.0, "correct_rate": 1.0}
    return DistillSettings(**(values | overrides))


def loss(model, data):
    return sum(model(**batch, labels=batch["input_ids"]).loss.item() for batch in data)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_first_corrects_a_copy_and_the_student_learns_from_it():
    data = token_batches(1, 4)
    _, teacher = models()
    before, given = loss(teacher, data), weights(teacher)
    better = corrected(teacher, data, None, how(steps=20))
    assert loss(better, data) < 0.8 * before
    assert torch.equal(weights(teacher), given)
    by_hand, by_setting, without = (models()[0] for _ in range(3))
    distill(by_hand, corrected(teacher, data, None, how(correct_tokens=480)), data, settings=how())
    distill(by_setting, teacher, data, settings=how(correction="first", correct_tokens=480))
    distill(without, teacher, data, settings=how())
    assert torch.equal(weights(by_hand), weights(by_setting))
    assert not torch.equal(weights(without), weights(by_setting))


def test_together_is_two_losses_without_a_gradient_between_them():
    """The student's gradient is that of a plain pair, the teacher's that of plain language modelling."""
    student, teacher = models()
    ids = token_batches(1, 4)[0]["input_ids"]
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    both = Together(student, teacher, Objective(), rate=0.2)
    found = both(ids, labels)
    found["loss"].backward()
    torch.testing.assert_close(found["loss"].detach(), found["kl"] + found["teacher_ce"])
    alone = CausalLM(models()[1])
    alone(ids, labels)["loss"].backward()
    for ours, plain in zip(both.corrected.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)
    plain_student = models()[0]
    Pair(plain_student, teacher)(ids, labels)["loss"].backward()
    for ours, plain in zip(student.parameters(), plain_student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("correction", ["first", "together"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_stopped_run_ends_with_the_same_weights(tmp_path, monkeypatch, correction, keep):
    settings, data = how(correction=correction, keep_teacher=keep), token_batches(4, 4)
    whole, teacher = models()
    distill(whole, teacher, data, settings=settings, run_dir=tmp_path / "whole")
    plain, counted = LearnerTrainer.training_step, []

    def stop(self, *args, **kwargs):
        counted.append(self.state.global_step)
        if len(counted) == 3:  # while the teacher is corrected, or both
            raise RuntimeError("pulled the plug")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LearnerTrainer, "training_step", stop)
    with pytest.raises(RuntimeError, match="plug"):
        distill(models()[0], teacher, data, settings=settings, run_dir=tmp_path / "run")
    student = models()[0]
    distill(student, teacher, data, settings=settings, run_dir=tmp_path / "run")
    assert torch.equal(weights(student), weights(whole))
    assert (tmp_path / "run/teacher/config.json").exists() == keep
    assert not (tmp_path / "run/correction").exists()


def test_what_is_not_known_is_refused():
    with pytest.raises(NestlingError, match="correction 'later'"):
        DistillSettings(correction="later")
    with pytest.raises(NestlingError, match="correct_tokens -1"):
        DistillSettings(correct_tokens=-1)
