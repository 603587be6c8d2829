"""Losses between intermediate states: where they are read, what they are worth, and how they are balanced."""

import pytest
import torch
from torch import nn

from nestling.anatomy import decoder
from nestling.distill import Pair
from nestling.distill.states import (
    STATES,
    balance,
    catching,
    check_states,
    cosine,
    mse,
    parse_layer_map,
    projection,
    readers,
    states_loss,
)
from nestling.errors import NestlingError
from tests.models import VARIANTS, tiny, token_batches

IDS = token_batches(1)[0]["input_ids"]
LABELS = torch.cat([IDS[:, 1:], torch.full_like(IDS[:, :1], -100)], 1)


def random_states(width, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for name in STATES}


def test_states_are_what_the_blocks_read():
    """In a pre-norm model: the residual stream after the norm that follows, of the third layer from the end."""
    model = tiny("llama")
    with catching(readers(model, STATES)) as caught, torch.no_grad():
        stream = model.model(IDS, output_hidden_states=True).hidden_states
    layers = model.model.layers
    torch.testing.assert_close(caught["embedding"], layers[0].input_layernorm(stream[0]))
    torch.testing.assert_close(caught["output"], layers[2].input_layernorm(stream[2]))
    with torch.no_grad():
        middle = (
            stream[1]
            + layers[1].self_attn(
                layers[1].input_layernorm(stream[1]),
                position_embeddings=model.model.rotary_emb(stream[1], torch.arange(12)[None]),
                attention_mask=None,
            )[0]
        )
    torch.testing.assert_close(caught["mlp_input"], layers[1].post_attention_layernorm(middle))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_architecture_has_them(variant):
    model = tiny(variant)
    with catching(readers(model, STATES)) as caught, torch.no_grad():
        decoder(model)(IDS)
    assert {name: state.shape[-1] for name, state in caught.items()} == dict.fromkeys(STATES, model.config.hidden_size)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_value_against_a_loop():
    ours, theirs = random_states(6, 1), random_states(6, 2)
    counted = torch.tensor([[True, True, False, True, True], [False, True, True, False, False]])
    cosines, squares = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name in STATES:
        for row in range(2):
            for place in range(5):
                if counted[row, place]:
                    a, b = ours[name][row, place], theirs[name][row, place]
                    cosines[row] += 1 - (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()
                    squares[row] += ((a - b) ** 2).sum() / 6
    for loss, total in (("cosine", cosines), ("mse", squares)):
        found = states_loss(ours, theirs, nn.Identity(), counted, loss)
        torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-12)
        everything = states_loss(ours, theirs, nn.Identity(), torch.ones_like(counted), loss)
        assert (everything - found).abs().min() > 1e-3  # negative control: the mask matters


def test_equal_states_cost_nothing():
    state = torch.randn(4, 6)
    assert cosine(state, 3 * state).abs().max() < 1e-6
    assert mse(state, state).max() == 0
    assert mse(state, 3 * state).min() > 0


def test_alpha_balances_and_is_detached():
    logits, states = torch.tensor([0.6, 1.5], requires_grad=True), torch.tensor([0.2, 0.3], requires_grad=True)
    alpha = balance(logits, states)
    assert not alpha.requires_grad
    torch.testing.assert_close(alpha * states, logits)
    zero = torch.zeros(2, requires_grad=True)
    assert (balance(logits, zero) == 0).all()
    (balance(logits, zero) * zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_state_loss_is_worth_as_much_as_the_logit_loss():
    pair = Pair(tiny("llama", seed=1), tiny("llama"), states=("embedding", "output"))
    found = pair(IDS, LABELS)
    torch.testing.assert_close(found["loss"], 2 * found["kl"])
    assert found["states"] != found["kl"]


def test_a_fixed_weight_is_a_plain_sum():
    pair = Pair(tiny("llama", seed=1), tiny("llama"), states=("embedding", "output"), state_weight=0.3)
    found = pair(IDS, LABELS)
    torch.testing.assert_close(found["loss"], found["kl"] + 0.3 * found["states"])


def test_the_gradient_is_the_same_however_the_batch_is_split():
    """alpha of each sequence, not of each micro-batch: rows of different length, whole or one by one."""
    ids = token_batches(1, batch=4)[0]["input_ids"]
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    labels[1, 3:], labels[2, 7:] = -100, -100
    count, gradients, losses = int((labels != -100).sum()), {}, {}
    for split in (4, 1, 3):
        pair = Pair(tiny("llama", seed=1, hidden_size=36), tiny("llama"), states=("embedding", "output"))
        parts = [
            pair(rows, targets, num_items_in_batch=count)["loss"]
            for rows, targets in zip(ids.split(split), labels.split(split), strict=True)
        ]
        losses[split] = sum(parts)
        losses[split].backward()
        gradients[split] = torch.cat([p.grad.flatten() for p in pair.parameters()])
    for split in (1, 3):
        torch.testing.assert_close(losses[split], losses[4], rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients[split], gradients[4], rtol=1e-7, atol=1e-10)


def test_one_alpha_per_micro_batch_would_depend_on_the_split():
    """Negative control: the two sequences have different ratios, so a common alpha weighs them otherwise."""
    pair = Pair(tiny("llama", seed=1), tiny("llama"), states=("output",))
    alphas = [found["kl"] / found["states"] for found in (pair(IDS[i : i + 1], LABELS[i : i + 1]) for i in range(2))]
    assert abs(alphas[0] / alphas[1] - 1) > 1e-3


def test_a_layer_map_names_the_layers():
    model = tiny("llama")
    with catching(readers(model, ("output",), 1)) as caught, torch.no_grad():
        stream = model.model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(caught["output"], model.model.layers[2].input_layernorm(stream[2]))
    default, same, other = (
        Pair(tiny("llama", seed=1), tiny("llama"), states=("output",), layer_map=layers)(IDS, LABELS)["states"]
        for layers in (None, (1, 1), (0, 2))
    )
    assert default == same != other
    assert parse_layer_map("29:13") == (29, 13)
    assert parse_layer_map("") is None
    with pytest.raises(NestlingError, match="layer_map '13' is not a pair"):
        parse_layer_map("13")
    with pytest.raises(NestlingError, match="name one from 0 to 2"):
        readers(model, ("output",), 3)


def test_projection_is_shared_trained_and_identity_for_equal_widths():
    same = Pair(tiny("llama", seed=1), tiny("llama"), states=("output",))
    assert isinstance(same.projection, nn.Identity)
    narrow = Pair(tiny("llama", seed=1, hidden_size=36), tiny("llama"), states=("embedding", "output"))
    assert narrow.projection.weight.shape == (48, 36)
    narrow(IDS, LABELS)["loss"].backward()
    assert narrow.projection.weight.grad.abs().sum() > 0
    assert not any("projection" in name for name in narrow.student.state_dict())


def test_projection_does_not_touch_the_global_seed():
    before = torch.random.get_rng_state()
    projection(tiny("llama", hidden_size=36), tiny("llama"))
    torch.manual_seed(0)
    assert before.shape == torch.random.get_rng_state().shape
    one, other = (projection(tiny("llama", hidden_size=36), tiny("llama"), seed=7) for _ in range(2))
    assert torch.equal(one.weight, other.weight)


def test_what_is_not_known_is_refused():
    with pytest.raises(NestlingError, match="state 'attention'"):
        check_states(["attention"], "cosine")
    with pytest.raises(NestlingError, match="state loss 'l1'"):
        check_states([], "l1")
    with pytest.raises(NestlingError, match="at least 2 layers"):
        readers(tiny("llama", num_hidden_layers=1), ("output",))
