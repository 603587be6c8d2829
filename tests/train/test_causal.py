"""Language modelling: the model's own loss and gradients, on every architecture."""

import pytest
import torch

from nestling.train import CausalLM, TrainSettings, fit
from tests.models import VARIANTS, in_float64, tiny, token_batches


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loss_and_gradients_are_the_models_own(variant):
    model, ids = tiny(variant), token_batches(1)[0]["input_ids"]
    with in_float64():
        expected = model(input_ids=ids, labels=ids).loss
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
        found = CausalLM(model)(ids, labels)
        found["loss"].backward()
    torch.testing.assert_close(found["loss"].float(), expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["ce"], found["loss"].detach())
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_one_batch_can_be_learned_by_heart():
    model, batch = tiny("llama-tied", dtype=torch.float32), token_batches(1, batch=4, seq=10)
    before = model(**batch[0], labels=batch[0]["input_ids"]).loss
    fit(CausalLM(model), batch, None, TrainSettings(steps=40, batch_size=4, learning_rate=1e-2))
    assert model(**batch[0], labels=batch[0]["input_ids"]).loss < 0.5 * before


def test_the_last_step_learns_too():
    model, batch = tiny("llama-tied", dtype=torch.float32), token_batches(1, batch=4, seq=10)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fit(CausalLM(model), batch, None, TrainSettings(steps=1, batch_size=4, learning_rate=1e-2, min_lr_ratio=0.0))
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
