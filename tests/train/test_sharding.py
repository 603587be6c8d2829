"""Sharded over processes, a learner computes and learns what it does whole, and goes on with another number of them."""

import json
import shutil
import signal

import pytest
import torch
import torch._dynamo
import torch.distributed.checkpoint.state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nestling import hub
from nestling.distill import distill
from nestling.errors import NestlingError
from nestling.train import fit, sharding
from nestling.train import trainer as trainer_module
from tests.distill import worker
from tests.models import tiny, token_batches
from tests.several import outcomes, together
from tests.train.test_learner import Scaled, settings

PLAIN = {"steps": 4, "save_every": 3, "batch_size": 4, "learning_rate": 1e-2, "ce_weight": 0.3}


def distilled(run_dir=None, variant="llama-tied", dtype=torch.float64, **overrides):
    """Weights of a student after four steps, and of its teacher; both models are as they were given, weights apart."""
    student = tiny(variant, seed=1, hidden_size=36, num_hidden_layers=3, dtype=dtype)
    teacher = tiny(variant, dtype=dtype)
    same = distill(student, teacher, token_batches(5, 4, 11), run_dir=run_dir, **(PLAIN | overrides))
    assert same is student
    assert not any(isinstance(module, FSDPModule) for model in (student, teacher) for module in model.modules())
    student(input_ids=token_batches(1)[0]["input_ids"])
    return tuple({name: p.detach().clone() for name, p in model.named_parameters()} for model in (student, teacher))


def records(run_dir, *names):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in names] for line in lines]


@pytest.mark.parametrize(("variant", "correction"), [("llama-tied", "none"), ("gemma3_text", "together")])
def test_losses_gradients_and_weights_are_those_of_one_process(tmp_path, variant, correction):
    """With a projection between the widths, activations recomputed and two micro-batches in each process."""
    how = {"variant": variant, "states": ["embedding", "output"], "gradient_checkpointing": True, "steps": 3}
    how["correction"] = correction
    expected = distilled(tmp_path / "one", **how)
    for found in together(2, tmp_path, lambda: distilled(tmp_path / "two", fsdp=True, micro_batch_size=1, **how)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    names = ("step", "tokens", "loss", "kl", "ce", "states", "grad_norm")
    torch.testing.assert_close(records(tmp_path / "two", *names), records(tmp_path / "one", *names), rtol=1e-6, atol=0)


class Watched(Scaled):
    """Notes at each step how much of the student this process holds."""

    def begin(self, step, steps):
        super().begin(step, steps)
        parts = list(self.student.parameters())
        assert all(isinstance(part, DTensor) for part in parts)
        self.held = sum(part.to_local().numel() for part in parts)


def watched(kind, fsdp):
    learner = kind(tiny("llama-tied"), rate=3.0)
    whole = sum(parameter.numel() for parameter in learner.student.parameters())
    fit(learner, token_batches(4, 4), None, settings(fsdp=fsdp, save_every=0))
    weights = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    return weights, getattr(learner, "held", whole) / whole, int(learner.seen)


def test_each_process_holds_its_part_and_scalars_are_trained_too(tmp_path):
    expected, _, seen = watched(Scaled, False)
    for weights, held, told in together(2, tmp_path, lambda: watched(Watched, True)):
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11)
        assert held == pytest.approx(0.5, abs=0.01)
        assert told == seen == 4


def from_disk(folder, **how):
    """As `distilled`, of models that the first process alone reads; and what a process holds of them at most."""
    student, teacher = (hub.load_once(folder / name)[0] for name in ("student", "teacher"))
    parts = [*student.parameters(), *teacher.parameters()]
    whole = sum(part.numel() for part in parts)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in (*teacher.model.layers, teacher.lm_head))
    plain, held = sharding.send, []

    def send(module):
        plain(module)
        there = [p for m in (student, teacher) for p in m.parameters() if p.device.type != "meta"]
        held.append(sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in there))

    sharding.send = send
    distill(student, teacher, token_batches(5, 4, 11), fsdp=True, **(PLAIN | how))
    weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    return student.device.type, weights, max(held), whole / 2 + largest + 100


def test_models_that_one_process_reads_are_sent_part_by_part(tmp_path):
    """The others never hold more than their half and one layer, and end without weights; the first has them all."""
    how = {"states": ["embedding", "output"], "steps": 3}
    hub.save(tiny("llama-tied", seed=1, hidden_size=36, num_hidden_layers=3), tmp_path / "student")
    hub.save(tiny("llama-tied"), tmp_path / "teacher")
    expected, _ = distilled(**how)
    (first, weights, all_of_it, _), (second, _, held, most) = together(2, tmp_path, lambda: from_disk(tmp_path, **how))
    assert (first, second) == ("cpu", "meta")
    torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-11)
    assert held <= most < all_of_it


def dies_in_step(number, run_dir):
    worker._signal_in_step(number, signal.SIGKILL)
    distilled(run_dir, fsdp=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run of two processes that were killed in their fourth step, after the checkpoint of the third."""
    folder = tmp_path_factory.mktemp("killed")
    codes = [code for code, _ in outcomes(2, folder, dies_in_step, 4, folder / "run")]
    assert codes == [-signal.SIGKILL] * 2
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted():
    torch.set_num_threads(1)
    return distilled()


def test_shards_are_safetensors_of_each_process(killed):
    checkpoint = killed / "checkpoints/checkpoint-3"
    files = sorted((checkpoint / "shards").iterdir())
    assert len(files) == 2
    sizes = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert max(sizes) < 0.51 * sum(sizes)
    assert not any(path.suffix in (".bin", ".pkl") or path.name == ".metadata" for path in checkpoint.rglob("*"))
    assert (checkpoint / "complete.json").exists()


@pytest.mark.parametrize("count", [1, 4])
def test_a_killed_run_goes_on_with_another_number_of_processes(killed, uninterrupted, tmp_path, count):
    run = shutil.copytree(killed, tmp_path / "run")
    for found in together(count, tmp_path, lambda: distilled(run, fsdp=True)):
        torch.testing.assert_close(found, uninterrupted, rtol=1e-9, atol=1e-11)
    assert [step for [step] in records(run, "step")] == [1, 2, 3, 4]


def test_the_optimizers_state_matters(killed, uninterrupted, tmp_path, monkeypatch):
    """Negative control: with a fresh optimizer the run ends elsewhere."""
    monkeypatch.setattr(trainer_module, "load_optimizer", lambda *arguments: None)
    run = shutil.copytree(killed, tmp_path / "run")
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(distilled(run, fsdp=True), uninterrupted, rtol=1e-9, atol=1e-11)


def test_mixed_precision_stays_near(tmp_path):
    how = {"steps": 1, "dtype": torch.float32}
    exact, _ = distilled(**how)
    found, _ = together(2, tmp_path, lambda: distilled(bf16=True, fsdp=True, **how))[0]
    assert 0 < max((found[name] - exact[name]).abs().max() for name in exact) <= 2.1 * PLAIN["learning_rate"]


def test_a_model_that_its_config_does_not_describe_is_refused():
    student = tiny("llama", dtype=torch.float32)
    student.model.gate = nn.Linear(3, 3)
    with pytest.raises(NestlingError, match="with fsdp off"), sharding.sharded(Scaled(student), student.device, False):
        pass
