"""The ratio that was asked for, met by moving the point at which gates decide."""

import itertools

import datasets
import pytest
import torch

from nestling import dmc
from nestling.errors import DataError, NestlingError
from tests.dmc.models import FULL, merging
from tests.models import tiny, token_batches

DATA = token_batches(6, 4, 48)


@pytest.mark.parametrize("variant", FULL[::4])
@pytest.mark.parametrize("gates", [{}, {"shared": True}, {"method": "dms", "window": 3}], ids=["dmc", "shared", "dms"])
def test_the_ratio_is_met(variant, gates):
    before = []
    for offset, ratio in itertools.product((-2.0, 5.0), (1.5, 3.0)):
        model = merging(variant, **gates)
        model.config.dmc["offset"] = offset
        before.append(dmc.measure(model, DATA).ratio / ratio)
        found = dmc.calibrate(model, DATA, ratio)
        assert found.before == pytest.approx(before[-1] * ratio)
        assert found.after == pytest.approx(ratio, rel=0.03)
        assert dmc.measure(model, DATA).ratio == pytest.approx(ratio, rel=0.03)
    assert max(before) > 1.1
    assert min(before) < 0.8  # the control: it was not met before


def test_what_was_learnt_stays_in_order():
    """Nothing but the offset moves: a token that merges at a ratio merges at a larger one too, in the first layer."""
    model, merged = merging(), []
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for ratio in (1.5, 2.0, 3.0):
        dmc.calibrate(model, DATA, ratio)
        with dmc.recording(model) as decisions, torch.no_grad():
            model(input_ids=DATA[0]["input_ids"], use_cache=False)
        merged.append(decisions[0].quiet)
    assert all((more | ~less).all() for less, more in itertools.pairwise(merged))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_gates_that_tell_nothing_apart_are_left():
    model = dmc.free(dmc.convert(tiny("llama")))
    assert dmc.calibrate(model, DATA, 3.0) == (1, 1)
    assert dmc.measure(model, DATA).ratio == 1


def test_padding_does_not_count():
    padded = []
    for batch in DATA:
        mask = torch.ones_like(batch["input_ids"])
        mask[::2, :20] = 0
        padded.append({**batch, "attention_mask": mask})
    model = merging()
    assert dmc.calibrate(model, padded, 2.5).after == pytest.approx(2.5, rel=0.03)
    assert dmc.measure(model, padded).ratio == pytest.approx(2.5, rel=0.03)


def test_refused():
    with pytest.raises(NestlingError, match="not compressed"):
        dmc.calibrate(tiny("llama"), DATA, 2.0)
    with pytest.raises(NestlingError, match=r"ratio 0\.5 is not possible"):
        dmc.calibrate(merging(), DATA, 0.5)
    with pytest.raises(DataError, match="no text"):
        dmc.calibrate(merging(), [], 2.0)


@pytest.mark.parametrize("kind", ["batches", "iterator", "dataset"])
def test_a_retrofit_ends_at_its_ratio(kind):
    rows = torch.cat([batch["input_ids"] for batch in DATA])
    data = {
        "batches": DATA,
        "iterator": iter(DATA),
        "dataset": datasets.Dataset.from_dict({"input_ids": rows.tolist()}),
    }
    how = {"steps": 4, "batch_size": 4, "learning_rate": 5e-3, "kd_weight": 0, "ce_weight": 1, "ratio": 2.0}
    model = dmc.retrofit(tiny("llama", dtype=torch.float32), data[kind], calibration_tokens=400, **how)
    sample = DATA[:3] if kind != "dataset" else [{"input_ids": rows[:9]}]
    assert dmc.measure(model, sample).ratio == pytest.approx(2, rel=0.05)
    assert model.config.dmc["learned"]["ratio"] < 1.5
    assert model.config.dmc["learned"]["offset"] == 5 != model.config.dmc["offset"]
    left = dmc.retrofit(tiny("llama", dtype=torch.float32), DATA, calibration_tokens=0, **how)
    assert left.config.dmc["offset"] == 5
    assert "learned" not in left.config.dmc
