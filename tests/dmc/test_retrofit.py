"""A retrofit: its three stages, what its loss asks for, and a run that is interrupted."""

import dataclasses

import pytest
import torch

from nestling import dmc
from nestling.anatomy.anatomy import Anatomy
from nestling.anatomy.attention import last_channel, sites
from nestling.dmc.learner import Retrofit, merged_part
from nestling.dmc.settings import RetrofitSettings
from nestling.dmc.show import Merges
from nestling.errors import NestlingError
from nestling.train import fit
from tests.dmc.models import merging
from tests.models import logits, tiny, token_batches
from tests.several import together

SETTINGS = {"ratio": 3.0, "batch_size": 2, "learning_rate": 5e-3, "warmup": 0.0}


def learner(**changes):
    plain = {"free_part": 0.25, "settle_part": 0.25, "kd_weight": 0, "ce_weight": 1}
    return Retrofit(dmc.convert(tiny("llama")), None, RetrofitSettings(**(SETTINGS | plain | changes)))


def test_stages():
    at = learner()
    seen = []
    for step in range(8):
        at.begin(step, 8)
        seen.append((round(at.student.config.dmc["keep"], 3), round(1 / (1 - at.goal), 3)))
    assert [keep for keep, _ in seen] == [1.0, 0.375, 0, 0, 0, 0, 0, 0]
    assert [ratio for _, ratio in seen] == [1, 1, 1.5, 2, 2.5, 3, 3, 3]
    anatomy = Anatomy.of(at.student)
    for name, rows in last_channel(anatomy, sites(anatomy)[0]).items():
        assert not at.student.state_dict()[name][rows].any()


def test_the_loss_asks_for_the_ratio_from_one_side_only():
    at = learner()
    at.begin(7, 8)
    at.student.train()
    ids = token_batches(1)[0]["input_ids"]
    labels = torch.roll(ids, -1, 1)
    dmc.free(at.student)
    weight = at.student.get_submodule("model.layers.0.self_attn.k_proj").weight
    gradients = []
    for goal in (0.0, 0.9):
        at.goal = goal
        torch.manual_seed(0)
        at.zero_grad()
        at(ids, labels)["loss"].backward()
        gradients.append(weight.grad[7].clone())
    assert (gradients[0] - gradients[1]).abs().max() > 0
    at.goal = 0.0
    with dmc.recording(at.student) as decisions:
        logits(at.student.eval(), ids)
    assert merged_part(decisions).tolist() == [0, 0]


def test_pressure_follows_the_shortfall():
    at = learner(gain=2.0)
    at.begin(2, 8)  # frees the channel, so nothing merges yet
    at.begin(7, 8)
    ids = token_batches(1)[0]["input_ids"]
    before = at.pressure.item()
    at(ids, torch.roll(ids, -1, 1))
    assert at.pressure.item() == before  # within a step all micro-batches are asked for the same
    at.begin(7, 8)
    assert at.pressure.item() == pytest.approx(before + 2 * (2 / 3))
    assert {"pressure", "shortfall"} <= at.state_dict().keys()


class _Gated(Retrofit):
    """Gates that differ from row to row from the first step on, and a goal that is never reached."""

    def begin(self, step, steps):
        self.press()
        self.goal, self.seen = 0.9, [*getattr(self, "seen", []), self.pressure.item()]


def pressures(**options):
    settings = RetrofitSettings(steps=4, batch_size=4, learning_rate=1e-12, kd_weight=0, ce_weight=1, **options)
    model = dmc.convert(tiny("llama", num_hidden_layers=1), scale=8.0, offset=0.3)  # gates that see no noise
    model.config.dmc["keep"] = 0.0
    at = _Gated(model, None, settings)
    fit(at, token_batches(4, 4, 12), None, settings)
    return at.seen


def test_pressure_is_the_same_in_every_process_and_however_a_step_is_split(tmp_path):
    expected = pressures()
    assert len(set(expected)) == 4
    assert pressures(micro_batch_size=1) == pytest.approx(expected, rel=1e-5)
    for found in together(2, tmp_path, lambda: pressures(micro_batch_size=1)):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_window_that_is_longer_than_the_ratio_allows_is_refused():
    at = Retrofit(dmc.convert(tiny("llama"), method="dms"), None, RetrofitSettings(method="dms", window=4))
    ids = token_batches(1, seq=16)[0]["input_ids"]
    with pytest.raises(NestlingError, match="window of 4 holds 5 alone"):
        at(ids, ids)


def test_an_interrupted_run_ends_at_the_same_weights(tmp_path):
    data, options = token_batches(8, seq=10), {"steps": 6, "save_every": 3, "kd_weight": 1.0} | SETTINGS
    whole = dmc.retrofit(tiny("llama", dtype=torch.float32), data, run_dir=tmp_path / "whole", **options)
    twice = tiny("llama", dtype=torch.float32)
    stop = _Stopping(data, after=4)
    with pytest.raises(KeyboardInterrupt):
        dmc.retrofit(twice, stop.batches(), run_dir=tmp_path / "twice", **options)
    again = dmc.retrofit(tiny("llama", dtype=torch.float32), data, run_dir=tmp_path / "twice", **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_run_that_goes_on_from_its_last_checkpoint_keeps_what_the_freed_channel_has_learnt(tmp_path):
    """Stopped after training and before the model was kept: no step is left that would say where the run is."""
    data, options = token_batches(4, seq=10), {"steps": 4, "save_every": 2, "kd_weight": 1.0} | SETTINGS
    trained, again = (
        dmc.retrofit(tiny("llama", dtype=torch.float32), data, run_dir=tmp_path, **options) for _ in range(2)
    )
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.config.dmc["keep"] == 0
    anatomy = Anatomy.of(trained)
    rows = last_channel(anatomy, sites(anatomy)[0]).items()
    assert any(trained.state_dict()[name][row].any() for name, row in rows)  # negative control: it has learnt


def retrofitted(**options):
    how = {"steps": 4, "kd_weight": 1.0, "save_every": 0, "calibration_tokens": 100} | SETTINGS | options
    model = dmc.retrofit(tiny("llama", dtype=torch.float32), token_batches(4, 4, 24), **how)
    return model.state_dict(), model.config.dmc["offset"]


def test_a_model_that_is_spread_over_processes_learns_the_same(tmp_path):
    """Its gate channel is freed where its rows are; noise is each process's own, so one process is no reference."""
    whole, spread = (together(2, tmp_path, lambda fsdp=fsdp: retrofitted(fsdp=fsdp)) for fsdp in (False, True))
    for (expected, offset), (found, moved) in zip(whole, spread, strict=True):
        # Adam divides the freed rows' first gradients by themselves, rounding and all; a step is 5e-3.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        assert moved == pytest.approx(offset, abs=1e-2)
    assert spread[0][1] == spread[1][1] != 5


class _Stopping:
    """Batches as before, and an interrupt at the end of a step."""

    def __init__(self, data, after):
        self.data, self.after = data, after

    def batches(self):
        steps = iter(range(self.after))
        begin = Retrofit.begin

        def stopping(self, step, total):
            if next(steps, None) is None:
                Retrofit.begin = begin
                raise KeyboardInterrupt
            begin(self, step, total)

        Retrofit.begin = stopping
        return self.data


def test_settings_that_cannot_work_are_refused():
    for wrong in (
        {"method": "x"},
        {"window": -1},
        {"ratio": 0.5},
        {"free_part": 0.6, "settle_part": 0.5},
        {"gain": -1.0},
        {"kd_weight": 0.0},
    ):
        with pytest.raises(NestlingError):
            dataclasses.replace(RetrofitSettings(), **wrong)
    with pytest.raises(NestlingError, match="already"):
        dmc.retrofit(merging(), token_batches(1))


def test_slots_of_a_text():
    found = Merges(("a", "b", "c", "d"), {2: ((True, False, True, False), (True, True, True, True))})
    assert found.slots(2, 0) == ["ab", "cd"]
    assert found.ratio(2, 0) == 2
    assert found.whole == pytest.approx(8 / 6)
    found = Merges(("a", "b", "c", "d"), {0: ((False, False, True, True),)}, dropped=True)
    assert found.slots(0, 0) == ["…c", "d"]
