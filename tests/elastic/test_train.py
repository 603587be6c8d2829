"""Training a family: what it learns, what it draws, and that neither a kill nor more processes change it."""

import json
import sys
from functools import partial

import pytest
import torch

from nestling.elastic import ElasticSettings, train
from nestling.elastic.learner import draw
from nestling.elastic.router import Router, gumbel, relaxed
from nestling.errors import NestlingError, TargetError
from nestling.shape import Shape
from nestling.train import LearnerTrainer, recomputes, split_batch
from tests.elastic.toy import sorted_parent, space_of
from tests.models import logits, random_ranking, tiny, token_batches
from tests.several import outcomes, together

DATA = token_batches(4, 4, 12)
QUICK = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3, "routing": 0.5}


STEPS = 6


def trained(run_dir=None, **overrides):
    """Three steps under soft masks and three on slices, of two members drawn for each."""
    model = tiny("llama-tied", hidden_size=36, intermediate_size=40, num_hidden_layers=3)
    settings = {
        "steps": STEPS,
        "batch_size": 4,
        "save_every": 2,
        "routing": 0.5,
        "probe_tokens": 44,
        "members_per_step": 2,
        "weights": [1, 2, 3],
        "per_layer": "intermediate_size",
        "learning_rate": 1e-3,
    }
    data, ranking = token_batches(6, 4, 11), random_ranking(model)
    return train(model, ["0.75x", "0.5x"], data, run_dir=run_dir, ranking=ranking, **(settings | overrides))


def weights(family):
    return {name: parameter.detach().clone() for name, parameter in family.parent.named_parameters()}


def test_what_a_cache_kept_of_the_teacher_teaches_as_it_does_itself(tmp_path):
    """Rounded to float16; fewer tokens teach something else."""

    def moved(cache=None, **overrides):
        family = trained(**({"probe_tokens": 0, "top_k": 6} | overrides), **({"cache": cache} if cache else {}))
        return torch.cat([value.flatten() for value in weights(family).values()])

    start, live = moved(learning_rate=1e-12, router_learning_rate=1e-12), moved()
    first, second = (moved(tmp_path / "cache") for _ in range(2))
    assert torch.equal(first, second)
    assert (first - live).norm() <= 2e-2 * (live - start).norm()
    assert (moved(top_k=2) - live).norm() > 5e-2 * (live - start).norm()


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"teacher": "none"}, {"long_context": 22, "long_tokens": 88}])
def test_a_cache_is_refused_that_cannot_serve(tmp_path, wrong):
    with pytest.raises(NestlingError, match="a teacher cache keeps the likeliest tokens of a frozen teacher"):
        trained(**({"top_k": 6} | wrong), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module")
def whole():
    torch.set_num_threads(1)
    return trained()


@pytest.mark.parametrize("step", [3, 6])  # after a checkpoint amid the routing, and one amid the slices
def test_a_run_that_dies_goes_on_to_the_same_family(step, whole, tmp_path, monkeypatch):
    plain, calls = LearnerTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise RuntimeError("the lights went out")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LearnerTrainer, "training_step", training_step)
    with pytest.raises(RuntimeError, match="lights"):
        trained(tmp_path / "run")
    family = trained(tmp_path / "run")
    assert family.entries == whole.entries
    expected = dict(whole.parent.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in family.parent.named_parameters())
    assert len(calls) == step + STEPS - 2 * ((step - 1) // 2)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_train_what_one_does(whole, tmp_path, fsdp):
    def part():
        family = trained(tmp_path / "run", fsdp=fsdp)
        return weights(family), family.entries

    for found, entries in together(2, tmp_path, part):
        torch.testing.assert_close(found, weights(whole), rtol=1e-5, atol=1e-6)
        assert entries == whole.entries


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_learn_from_one_cache(tmp_path, fsdp):
    """The first fills it, both read it."""
    how = {"probe_tokens": 0, "top_k": 6}
    expected = weights(trained(cache=tmp_path / "one", **how))
    for found in together(2, tmp_path, lambda: weights(trained(fsdp=fsdp, cache=tmp_path / "two", **how))):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_shards_go_on_in_one_process(whole, tmp_path, monkeypatch):
    """From a checkpoint that two have written amid the slices."""
    stop = partial(monkeypatch.setattr, LearnerTrainer, "training_step")
    plain = LearnerTrainer.training_step

    def part():
        stop(lambda self, *a, **k: plain(self, *a, **k) if self.state.global_step < 5 else sys.exit(3))
        trained(tmp_path / "run", fsdp=True)

    assert [code for code, _ in outcomes(2, tmp_path, part)] == [1, 1]
    assert (tmp_path / "run/checkpoints/checkpoint-4/shards").exists()
    torch.testing.assert_close(weights(trained(tmp_path / "run", fsdp=True)), weights(whole), rtol=1e-5, atol=1e-6)


def test_activations_that_are_recomputed_change_nothing(whole):
    """Under soft masks, whose hooks are gone by the backward pass, and on slices."""
    family = trained(gradient_checkpointing=True)
    assert family.entries == whole.entries
    expected = dict(whole.parent.named_parameters())
    assert all(torch.allclose(p, expected[name], atol=1e-6) for name, p in family.parent.named_parameters())
    assert not recomputes(family.parent)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("qwen3_moe", {"weights": [1, 2, 2]}),
        ("llama", {"teacher": "trainable", "masks": "straight_through", "per_layer": "intermediate_size"}),
        ("qwen2", {"teacher": "none", "masks": "hard", "chain": True}),
        ("nemotron_h", {"long_context": 24, "long_tokens": 96, "long_weights": [2, 1, 1]}),
    ],
)
def test_every_kind_of_training_gives_members_on_their_budgets(variant, settings, tmp_path):
    model = tiny(variant, dtype=torch.float32)
    budgets = ["0.75x", "0.5x"]
    data = token_batches(8, 4, 12)
    family = train(model, budgets, data, ranking=random_ranking(model), run_dir=tmp_path, **(QUICK | settings))
    for name in budgets:
        assert family.cost(name).params / family.cost("1x").params == pytest.approx(float(name[:-1]), rel=0.01)
        assert torch.isfinite(logits(family[name], data[0]["input_ids"])).all()
    if variant == "qwen3_moe":
        assert any("num_experts" in entry.shape for entry in family.entries.values())
    if settings.get("chain"):
        small, large = family.entry("0.5x").shape, family.entry("0.75x").shape
        assert all(small[field] <= large[field] for field in small)
    assert (tmp_path / "long" / "metrics.jsonl").exists() == ("long_context" in settings)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kind = {"trainable": "kl 0.5x", "none": "ce 0.5x"}.get(settings.get("teacher", ""), "kl 1x")
    assert kind in records[-1]


def test_the_parent_is_its_own_teacher_at_first_and_members_learn():
    model = tiny("llama", dtype=torch.float32)
    shapes = {"0.5x": Shape(intermediate_size=22, hidden_size=36)}
    family_of = lambda steps: train(  # noqa: E731
        tiny("llama", dtype=torch.float32), ["0.5x"], DATA, ranking=random_ranking(model), shapes=shapes,
        **(QUICK | {"steps": steps, "learning_rate": 3e-3}),
    )  # fmt: skip
    ids = DATA[0]["input_ids"]
    before, after = family_of(1), family_of(16)
    assert (before["1x"].config.hidden_size, before["0.5x"].config.hidden_size) == (48, 36)
    taught = logits(model, ids).log_softmax(-1)

    def apart(family):
        return (taught.exp() * (taught - logits(family["0.5x"], ids).log_softmax(-1))).sum(-1).mean()

    assert apart(after) < 0.8 * apart(before)


def test_draws_follow_their_shares_and_the_seed():
    shares = [0.5, 0.3, 0.2]
    drawn = [draw(shares, 1, 7, step)[0] for step in range(3000)]
    for number, share in enumerate(shares):
        expected, spread = 3000 * share, (3000 * share * (1 - share)) ** 0.5
        assert abs(drawn.count(number - 1) - expected) < 3 * spread
    assert drawn == [draw(shares, 1, 7, step)[0] for step in range(3000)]
    assert draw(shares, 0, 7, 0) == [-1, 0, 1]


def test_noise_is_a_function_of_its_arguments_and_leaves_the_generator_alone():
    model, ranking = sorted_parent("llama")
    space, state = space_of(model, ranking), torch.get_rng_state()
    noise = gumbel(space, 0, 3, 1)
    Router(space, [noise], seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    for field, value in gumbel(space, 0, 3, 1).items():
        assert torch.equal(value, noise[field])
        assert not torch.equal(value, gumbel(space, 0, 4, 1)[field])
    lots = torch.cat([gumbel(space, 0, step, 0)["intermediate_size"].flatten() for step in range(400)])
    assert lots.mean().item() == pytest.approx(0.5772, abs=0.05)


def test_masks_are_the_chances_or_their_likeliest_choice():
    chances = {"a": torch.tensor([[0.2, 0.5, 0.3]], requires_grad=True)}
    assert torch.equal(relaxed(chances, "soft")["a"], chances["a"])
    for masks, slopes in (("straight_through", [1.0, 2.0, 3.0]), ("hard", [0.0, 4.0, 0.0])):
        chances["a"].grad = None
        put = relaxed(chances, masks)["a"]
        assert put.tolist() == [[0.0, 1.0, 0.0]]
        (put * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        assert chances["a"].grad[0].tolist() == pytest.approx(slopes)


def test_the_second_stage_has_as_many_tokens_a_step_in_fewer_sequences():
    first = ElasticSettings(context=32, batch_size=8, micro_batch_size=4, long_context=128, long_tokens=512)
    second = first.second()
    assert (second.context, second.batch_size, second.total_steps(128)) == (128, 2, 2)
    assert split_batch(second, 128, torch.device("cpu")).rows == 2


def test_what_cannot_be_is_refused_before_any_work():
    model = tiny("llama", dtype=torch.float32)
    with pytest.raises(TargetError, match="no member can keep"):
        train(model, ["0.01x"], None)
    with pytest.raises(TargetError, match="each budget once"):
        train(model, [], None)
    with pytest.raises(TargetError, match="needs times measured"):
        train(model, ["latency=0.7x"], None)
    with pytest.raises(NestlingError, match="second stage"):
        ElasticSettings(long_context=64)
