"""The loop for any learner: schedules are told the step, further modules and buffers are trained, saved and resumed."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nestling.anatomy import decoder
from nestling.train import Learner, LearnerTrainer, Objective, TrainSettings, fit, model_inputs
from tests.models import tiny, token_batches


class Scaled(Learner):
    """Cross-entropy with a learned scale on the hidden states and a buffer that counts steps."""

    def __init__(self, student, rate=1.0):
        super().__init__(student)
        self.scale = nn.Parameter(torch.ones((), dtype=student.dtype))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.rates = {"scale": rate}
        self.steps = []

    def begin(self, step, steps):
        self.steps.append((step, steps))
        self.seen += 1

    def forward(self, input_ids, labels, attention_mask=None, num_items_in_batch=None):
        hidden = decoder(self.student)(**model_inputs(input_ids, attention_mask)).last_hidden_state
        losses = self.logit_losses(
            hidden * self.scale, labels, Objective(kd_weight=0, ce_weight=1), None, num_items_in_batch
        )
        return {"loss": losses.loss, "ce": losses.cross_entropy}


def settings(**overrides):
    return TrainSettings(**({"steps": 4, "batch_size": 4, "warmup": 0.0, "save_every": 2} | overrides))


def test_cross_entropy_alone_is_the_models_own_loss():
    model, ids = tiny("llama-tied"), token_batches(1)[0]["input_ids"]
    expected = model(input_ids=ids, labels=ids).loss
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    torch.testing.assert_close(Scaled(model)(ids, labels)["loss"].float(), expected)


def test_every_step_is_announced_and_everything_is_trained(tmp_path):
    learner = Scaled(tiny("llama-tied"))
    fit(learner, token_batches(4, 4), None, settings(), tmp_path)
    assert learner.steps == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert learner.scale.item() != 1
    saved = load_file(tmp_path / "checkpoints/checkpoint-4/learner.safetensors")
    assert set(saved) == {"scale", "seen"}
    assert saved["seen"] == 4


def test_resuming_restores_what_is_beside_the_student(tmp_path, monkeypatch):
    whole = Scaled(tiny("llama-tied"))
    fit(whole, token_batches(4, 4), None, settings())
    plain = LearnerTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise RuntimeError("pulled the plug")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LearnerTrainer, "training_step", stop)
    with pytest.raises(RuntimeError, match="plug"):
        fit(Scaled(tiny("llama-tied")), token_batches(4, 4), None, settings(), tmp_path)
    monkeypatch.setattr(LearnerTrainer, "training_step", plain)
    resumed = Scaled(tiny("llama-tied"))
    fit(resumed, token_batches(4, 4), None, settings(), tmp_path)
    assert resumed.steps == [(2, 4), (3, 4)]
    for (name, found), expected in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_rates_multiply_the_learning_rate_of_what_they_name(rate):
    learner = Scaled(tiny("llama-tied"), rate)
    fit(learner, token_batches(4, 4), None, settings())
    assert (learner.scale.item() == 1) == (rate == 0)
