"""The latency table: its law against made-up times, its parts against the model, and what is kept of it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.budget import Budget
from nestling.errors import CheckpointError, TargetError
from nestling.search import Pricing, latency, reachable, shapes, timing
from nestling.search.latency import Curve, Table
from nestling.search.parts import Work, parts
from nestling.search.timing import Sample
from tests.models import VARIANTS, tiny

CPU = torch.device("cpu")


def law(weights, cache):
    """Made-up seconds of a part."""
    return 1e-5 + 2e-9 * weights + 5e-9 * cache


def made_up(anatomy, work, count=8):
    """A table whose times follow the law exactly."""
    pricing = Pricing(anatomy)
    samples: dict[str, list[Sample]] = {}
    for probe in timing.probes(anatomy, anatomy.num_layers, count):
        form = pricing.form(pricing.capped(probe))
        for part in parts(anatomy):
            sizes = form.sizes[form.layers.index(part.layer) if part.layer is not None else 0]
            reads = part.reads(anatomy, sizes, work)
            letters = tuple(sizes[letter] for letter in part.letters)
            samples.setdefault(part.name, []).append(Sample(letters, reads, law(*reads)))
    return Table(work, samples)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_cover_every_tensor_once(variant):
    anatomy = Anatomy.of(tiny(variant))
    names = [spec.name for part in parts(anatomy) for spec in part.tensors]
    computed = {name for name, spec in anatomy.tensors.items() if spec.computes}
    assert sorted(names) == sorted(computed - {anatomy.architecture.lookup})
    modules = dict(tiny(variant).named_modules())
    assert all(part.module in modules for part in parts(anatomy) if part.module is not None)


@pytest.mark.parametrize("variant", ["llama", "phi3", "gemma3_text", "qwen2-sliding"])
def test_a_law_is_found_again_at_sizes_that_were_not_measured(variant):
    anatomy, work = Anatomy.of(tiny(variant)), Work(2, 20)
    table, pricing = made_up(anatomy, work), Pricing(Anatomy.of(tiny(variant)))
    for shape in (
        {},
        {"intermediate_size": 27},
        {"hidden_size": 42, "num_hidden_layers": 3},
        {"num_key_value_heads": 1},
    ):
        form = pricing.form(pricing.capped(shape))
        expected = 0.0
        for part in parts(anatomy):
            if part.layer is None or part.layer in form.layers:
                sizes = form.sizes[0 if part.layer is None else form.layers.index(part.layer)]
                expected += law(*part.reads(anatomy, sizes, work))
        assert table.milliseconds(anatomy, form) == pytest.approx(1e3 * expected, rel=1e-3)


def test_the_curve_goes_through_what_was_measured():
    samples = [Sample((n, 8), (8.0 * n, 4.0), 1e-6 * n * (1 + 0.3 * math.sin(n))) for n in (8, 16, 24, 40)]
    curve = Curve.fit(samples)
    for sample in samples:
        assert curve.at(sample.sizes, sample.reads) == pytest.approx(sample.seconds, rel=1e-6)
    between = curve.at((20, 8), (160.0, 4.0))
    assert min(s.seconds for s in samples) < between < max(s.seconds for s in samples)
    assert all(c >= 0 for c in curve.coefficients)


def test_a_step_is_measured_and_adds_up(monkeypatch):
    monkeypatch.setattr(timing, "STEPS", 3)
    anatomy = Anatomy.of(tiny("llama", dtype=torch.float32))
    samples = timing.measure(anatomy, CPU, torch.float32, Work(1, 8), count=3)
    assert set(samples) == {part.name for part in parts(anatomy)}
    assert all(len(rows) == 3 and all(sample.seconds > 0 for sample in rows) for rows in samples.values())
    table = Table(Work(1, 8), samples)
    pricing = Pricing(anatomy, latency=lambda form: table.milliseconds(anatomy, form))
    whole, half = pricing.cost({}), pricing.cost({"num_hidden_layers": 2})
    per_layer = sum(samples[part.name][0].seconds for part in parts(anatomy) if part.layer == 0)
    assert whole.latency_ms - half.latency_ms == pytest.approx(1e3 * 2 * per_layer, rel=1e-6)


def test_a_latency_limit_is_kept_like_any_other():
    anatomy, work = Anatomy.of(tiny("llama")), Work(1, 16)
    table = made_up(anatomy, work)
    pricing = Pricing(anatomy, latency=lambda form: table.milliseconds(anatomy, form))
    whole = pricing.cost({}).latency_ms
    for text in ("latency=0.8x", f"latency={0.8 * whole:.9f}ms"):
        space = reachable(pricing, Budget.parse(text))
        assert all(price.latency_ms <= 0.8 * whole * (1 + 1e-6) for _, price in shapes(space))
    with pytest.raises(TargetError, match=r"no shape of this model keeps latency=0\.01x"):
        reachable(pricing, Budget.parse("latency=0.01x"))


def test_times_are_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path))
    anatomy, calls = Anatomy.of(tiny("llama")), []
    monkeypatch.setattr(latency, "measure", lambda *a, **k: calls.append(a) or made_up(anatomy, Work()).samples)
    first = latency.table(anatomy, CPU, torch.float32)
    again = latency.table(Anatomy.of(tiny("llama", seed=5)), CPU, torch.float32)
    assert len(calls) == 1, "weights are no part of it"
    assert again.samples == first.samples
    for other in (
        (Anatomy.of(tiny("llama", intermediate_size=40)), CPU, torch.float32),
        (anatomy, CPU, torch.bfloat16),
        (anatomy, CPU, torch.float32, replace(Work(), context=7)),
    ):
        latency.table(*other)
    assert len(calls) == 4
    for file in (tmp_path / "latency").iterdir():
        file.write_text(json.dumps({"samples": 3}))
    with pytest.raises(CheckpointError, match=r"the latency table .* is damaged: delete it"):
        latency.table(anatomy, CPU, torch.float32)
