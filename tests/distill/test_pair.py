"""A student and its teacher as one module: against the plain loss on whole logits, on every architecture."""

import pytest
import torch
import torch.nn.functional as F

from nestling.distill import Pair
from nestling.train import Objective
from nestling.train.losses import IGNORE
from tests.models import VARIANTS, VOCAB, in_float64, tiny, token_batches


def shifted(ids):
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], 1)


def plain(student, teacher, ids, mask=None):
    """KL on the models' own logits, token-weighted, computed whole."""
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    counted = (real[:, 1:] & real[:, :-1]).flatten()
    with torch.no_grad():
        theirs = teacher(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)[counted]
    ours = student(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)[counted]
    return F.kl_div(F.log_softmax(ours, -1), F.log_softmax(theirs, -1), log_target=True, reduction="sum") / int(
        counted.sum()
    )


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_equals_the_plain_loss(variant):
    student, teacher = tiny(variant, seed=1), tiny(variant, seed=0)
    ids = token_batches(1)[0]["input_ids"]
    with in_float64():
        expected = plain(student, teacher, ids)
        expected.backward()
        gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
        student.zero_grad()
        found = Pair(student, teacher)(ids, shifted(ids))["loss"]
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-7, atol=1e-10)
    assert all(p.grad is None for p in teacher.parameters())


def test_padding_on_either_side_counts_for_nothing():
    student, teacher = tiny("qwen3", seed=1), tiny("qwen3", seed=0)
    ids = token_batches(1, batch=2, seq=9)[0]["input_ids"]
    for side in (slice(0, 3), slice(6, 9)):
        mask = torch.ones_like(ids)
        mask[1, side] = 0
        labels = torch.where((mask & mask.roll(-1, 1)).bool(), shifted(ids), IGNORE)
        found = Pair(student, teacher)(ids, labels, mask)["loss"]
        torch.testing.assert_close(found, plain(student, teacher, ids, mask), rtol=1e-9, atol=1e-11)
        changed = ids.clone()
        changed[1, side] = 5
        torch.testing.assert_close(Pair(student, teacher)(changed, labels, mask)["loss"], found)
        assert abs(Pair(student, teacher)(ids, shifted(ids))["loss"] - found) > 1e-6  # unmasked, padding counts


def test_swapped_models_differ():
    one, other = tiny("llama", seed=1), tiny("llama", seed=0)
    ids = token_batches(1)[0]["input_ids"]
    assert abs(Pair(one, other)(ids, shifted(ids))["loss"] - Pair(other, one)(ids, shifted(ids))["loss"]) > 1e-3


def test_teacher_is_not_part_of_the_module():
    student, teacher = tiny("llama", seed=1), tiny("llama", seed=0)
    names = {name.split(".")[0] for name, _ in Pair(student, teacher).named_parameters()}
    assert names == {"student"}


def test_recomputed_activations_change_nothing():
    ids = token_batches(1)[0]["input_ids"]
    gradients = []
    for recompute in (False, True):
        student, teacher = tiny("llama-tied", seed=1), tiny("llama-tied", seed=0)
        student.train()
        if recompute:
            student.activation_checkpointing_enable()
        Pair(student, teacher, states=("embedding", "output", "mlp_input"))(ids, shifted(ids))["loss"].backward()
        gradients.append([p.grad for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_teacher_keeps_its_dtype_under_mixed_precision():
    """With bfloat16 autocast, a float32 teacher still computes in float32."""
    student, teacher = (tiny("llama", seed=s, dtype=torch.float32) for s in (1, 0))
    seen = []
    for module in (teacher.model.layers[0].mlp, teacher.lm_head):
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    ids = token_batches(1)[0]["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        found = Pair(student, teacher)(ids, shifted(ids))["loss"]
    found.backward()
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(found, plain(student, teacher, ids), rtol=5e-2, atol=5e-2)
    assert all(p.grad.dtype == torch.float32 for p in student.parameters())


def test_other_dtype_of_teacher():
    student, teacher = tiny("llama", seed=1, dtype=torch.float32), tiny("llama", dtype=torch.bfloat16)
    ids = token_batches(1)[0]["input_ids"]
    loss = Pair(student, teacher, Objective("reverse_kl"))(ids, shifted(ids))["loss"]
    assert loss.dtype == torch.float32
    assert 0 < loss < 2 * torch.log(torch.tensor(float(VOCAB)))
