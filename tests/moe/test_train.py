"""Losses of routers on constructed cases, what guiding changes and what not, and whole small trainings."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nestling.anatomy.routing import BIAS
from nestling.errors import NestlingError
from nestling.moe import (
    MixtureLM,
    MixtureSettings,
    fresh_scale,
    health,
    loads,
    mixture_config,
    routed_modules,
    scale_experts,
    train,
)
from nestling.moe.routers import Call, balance_loss, over_capacity, sequence_balance_loss, z_loss
from tests.models import tiny, token_batches


def call(index, logits=None, real=None, rows=1, experts=4):
    index = torch.tensor(index)
    logits = torch.zeros(len(index), experts) if logits is None else logits
    return Call(logits, index, torch.ones(len(index)) if real is None else torch.tensor(real), rows)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one_when_even_whatever_k(k):
    index = [[(t + j) % 4 for j in range(k)] for t in range(8)]
    torch.testing.assert_close(balance_loss(call(index)), torch.tensor(1.0))


def test_balance_is_experts_over_k_when_collapsed():
    logits = torch.tensor([[9.0, 9.0, -9.0, -9.0]] * 6)
    torch.testing.assert_close(balance_loss(call([[0, 1]] * 6, logits)), torch.tensor(2.0), rtol=1e-4, atol=1e-4)


def test_opposite_halves_are_not_balanced_when_layers_are_apart():
    a = balance_loss(call([[0, 1]] * 6, torch.tensor([[9.0, 9, -9, -9]] * 6)))
    b = balance_loss(call([[2, 3]] * 6, torch.tensor([[-9.0, -9, 9, 9]] * 6)))
    assert (a + b) / 2 > 1.99


def test_padding_counts_nowhere():
    logits = torch.randn(6, 4)
    whole, part = call([[0]] * 4 + [[3]] * 2, logits, [1.0] * 4 + [0.0] * 2), call([[0]] * 4, logits[:4])
    for loss in (balance_loss, z_loss):
        torch.testing.assert_close(loss(whole), loss(part))


def test_sequence_balance_sees_what_the_batch_hides():
    logits = torch.tensor([[9.0, -9, -9, -9]] * 3 + [[-9.0, 9, -9, -9]] * 3)
    both = call([[0]] * 3 + [[1]] * 3, logits, rows=2)
    torch.testing.assert_close(balance_loss(both), torch.tensor(2.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sequence_balance_loss(both), torch.tensor(4.0), rtol=1e-4, atol=1e-4)


def test_global_counts_over_two_micro_batches_are_those_of_one():
    torch.manual_seed(0)
    logits, index = torch.randn(8, 4), torch.randint(0, 4, (8, 1)).tolist()
    parts = [call(index[:4], logits[:4]), call(index[4:], logits[4:])]
    counts = sum(part.counts() for part in parts)
    torch.testing.assert_close(sum(balance_loss(part, counts) for part in parts) / 2, balance_loss(call(index, logits)))
    assert not torch.isclose(sum(map(balance_loss, parts)) / 2, balance_loss(call(index, logits)))


def test_z_loss_is_the_squared_log_partition():
    torch.testing.assert_close(z_loss(call([[0]], torch.zeros(1, 4))), torch.tensor(math.log(4) ** 2))


def test_capacity_drops_the_last_ones_and_a_large_one_none():
    index = torch.tensor([[0], [0], [1], [0], [0], [2]])
    assert over_capacity(index, 3, 1.0).flatten().tolist() == [False, False, False, True, True, False]
    assert not over_capacity(index, 3, 3.0).any()


def test_health_on_constructed_loads():
    assert health([torch.tensor([5, 5, 5, 5])]) == pytest.approx({"max_load": 1, "entropy": 1, "dead": 0})
    assert health([torch.tensor([8, 0, 0, 0])]) == pytest.approx({"max_load": 4, "entropy": 0, "dead": 0.75})


def batch():
    ids = token_batches(1, 4, 10)[0]["input_ids"]
    return ids, torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)


def learner(variant="qwen3_moe", **settings):
    return MixtureLM(tiny(variant, dtype=torch.float32), MixtureSettings(**settings))


@pytest.mark.parametrize("level", ["global", "batch", "sequence"])
def test_the_loss_is_the_sum_of_its_parts_and_reaches_routers(level):
    ids, labels = batch()
    made = learner(balance=0.5, balance_over=level, z_loss=0.25)
    with made.guided():
        found = made(ids, labels)
    expected = found["ce"] + 0.5 * found["balance"] + 0.25 * found["z"]
    torch.testing.assert_close(found["loss"].float(), expected.float())
    plain = learner(balance=0, z_loss=0)
    with plain.guided():
        ce = plain(ids, labels)
    torch.testing.assert_close(ce["loss"].float(), found["ce"].float())
    found["loss"].backward()
    ce["loss"].backward()
    grads = [next(routed_modules(m.student))[1].weight.grad for m in (made, plain)]
    assert not torch.allclose(*grads)


def test_recomputation_counts_once_and_gives_the_same_gradients():
    ids, labels = batch()
    grads = []
    for recompute in (False, True):
        made = learner(capacity=1.0)
        made.train()
        if recompute:
            made.student.gradient_checkpointing_enable({"use_reentrant": False})
        with made.guided():
            made(ids, labels)["loss"].backward()
        assert made.loads.sum() == 3 * ids.numel() * 2
        grads.append([p.grad for p in made.student.parameters()])
    torch.testing.assert_close(*grads)


def test_a_large_capacity_changes_nothing_and_a_small_one_does():
    ids, labels = batch()
    losses = []
    for capacity in (0.0, 3.0, 0.5):
        made = learner(capacity=capacity)
        with made.guided():
            losses.append(made(ids, labels)["ce"].item())
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] != pytest.approx(losses[2], abs=1e-4)


def test_routers_stay_float32_under_mixed_precision():
    ids, labels = batch()
    made, seen = learner(), []
    router = next(routed_modules(made.student))[1]
    with made.guided(), torch.autocast("cpu", torch.bfloat16):
        hook = router.register_forward_hook(lambda m, a, o: seen.append(o[0].dtype))
        made(ids, labels)
        hook.remove()
    assert seen == [torch.float32]


def test_the_bias_moves_once_a_step_and_selects_without_weighing():
    made = learner("deepseek_v3", bias_rate=1e-2, balance=0.0)
    router = next(routed_modules(made.student))[1]
    before, (ids, labels) = getattr(router, BIAS).clone(), batch()
    with made.guided():
        made(ids, labels)
        made(ids, labels)
    made.begin(1, 2)
    moved = getattr(router, BIAS) - before
    assert moved.abs().max() <= 2e-2
    assert moved.mean().abs() < 1e-6
    assert moved.any()
    assert not made.loads.any()


def test_a_bias_that_is_not_there_is_refused():
    with pytest.raises(NestlingError, match="bias_rate"):
        learner(bias_rate=1e-3)
    with pytest.raises(NestlingError, match="upcycle"):
        learner("llama")
    with pytest.raises(NestlingError, match="global"):
        MixtureSettings(balance_over="layer")


def test_training_logs_the_routers_and_learns(tmp_path):
    model = tiny("qwen3_moe", dtype=torch.float32)
    settings = MixtureSettings(steps=6, batch_size=4, learning_rate=5e-3, save_every=0, capacity=2.0)
    train(model, token_batches(2, 4, 16), None, settings, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if "balance" in record]
    assert {"ce", "balance", "z", "dropped"} <= set(records[0])
    assert {"max_load", "entropy", "dead"} <= set(records[-1])
    assert records[-1]["ce"] < records[0]["ce"]
    assert 1 <= records[-1]["max_load"] <= 6
    counted = loads(model, token_batches(1, 4, 16))
    assert [int(layer.sum()) for layer in counted] == [128] * 3
    assert not any(module._forward_hooks for module in model.modules())


def test_init_scale_scales_experts_outputs():
    model = tiny("mixtral")
    before = model.model.layers[0].mlp.experts.down_proj.clone()
    scale_experts(model, 0.1)
    torch.testing.assert_close(model.model.layers[0].mlp.experts.down_proj, before * 0.1)


def test_a_fresh_block_writes_as_much_whatever_granularity_and_order():
    written = {}
    for case in ((8, 2, 1, True), (8, 2, 8, True), (8, 2, 1, False), (8, 2, 8, False)):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 90}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        config = mixture_config(AutoConfig.for_model("qwen3", **sizes, **heads), *case)
        model = AutoModelForCausalLM.from_config(config)
        scale_experts(model, fresh_scale(*case))
        with torch.no_grad():
            written[case] = model.model.layers[0].mlp(torch.randn(1, 512, 32)).std().item()
    assert max(written.values()) < 1.35 * min(written.values())
    assert fresh_scale(8, 2, 8, False) == 32


def test_fresh_routed_experts_write_as_much_however_many_parts_are_shared():
    written = []
    for shared in (1, 4, 6):
        torch.manual_seed(0)
        dense = AutoConfig.for_model(
            "qwen2",
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=1,
        )
        model = AutoModelForCausalLM.from_config(mixture_config(dense, 8, 2, 8, True, shared))
        scale_experts(model, fresh_scale(8, 2, 8, True, shared))
        block = model.model.layers[0].mlp
        torch.nn.init.zeros_(block.shared_expert.down_proj.weight)
        with torch.no_grad():
            written.append(block(torch.randn(1, 512, 32)).std().item())
    assert max(written) < 1.35 * min(written)
    assert fresh_scale(8, 2, 8) != fresh_scale(8, 2, 8, shared=6)
