"""The pieces of the charts: colours, ticks, strips, curves."""

import itertools
import math
import random
import re

import numpy as np
import pytest

from nestling.report import colour, write_report
from nestling.report.curve import curves, goal, series, smooth, thin
from nestling.report.picture import CELLS, Scale, Strip, axes, describe, layers, strip_svg
from nestling.report.scatter import candidates, others, pareto, scatter
from nestling.report.svg import plain, scaled, ticks
from tests.report import runs


@pytest.mark.parametrize("dark", [False, True])
def test_colours_run_one_way_in_even_steps(dark):
    points = [colour.oklab(one) for one in colour.scale(dark)]
    steps = [math.dist(a, b) for a, b in itertools.pairwise(points)]
    falls = [a[0] - b[0] for a, b in itertools.pairwise(points)]
    assert all(fall < 0 if dark else fall > 0 for fall in falls)
    assert max(steps) < 1.8 * min(steps)


def test_oklab_of_known_colours():
    assert colour.oklab("#ffffff") == pytest.approx((1, 0, 0), abs=1e-3)
    assert colour.oklab("#ff0000") == pytest.approx((0.628, 0.225, 0.126), abs=1e-3)


def test_levels_never_fall_as_scores_rise():
    draw = random.Random(0)
    scores = sorted(math.exp(draw.gauss(0, 2)) for _ in range(500))
    levels = [Scale.of(np.array(scores)).level(score) for score in scores]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, colour.LEVELS - 1)


@pytest.mark.parametrize("scores", [[], [1.0], [0.0] * 9, [-3.0, 0.0, 2.0], [1e-30, 1.0, 1e30], [5.0] * 4])
def test_scales_of_odd_scores(scores):
    scale = Scale.of(np.array(scores))
    assert all(0 <= scale.level(score) < colour.LEVELS for score in scores)


def rectangles(drawing: str) -> list[tuple[int, float]]:
    return sorted((int(x), float(width)) for x, width in re.findall(r"M(\d+) 0h([\d.]+)v1", drawing))


@pytest.mark.parametrize("units", [17, 56, 57, 1536, 20_011])
def test_cells_cover_the_strip_without_gap_or_overlap(units):
    draw = random.Random(units)
    strip = Strip(units, units, np.array(sorted((draw.random() for _ in range(units)), reverse=True)))
    cells = rectangles(strip_svg(strip, Scale.of(strip.scores)))
    assert len(cells) <= CELLS
    assert cells[0][0] == 0
    assert sum(cells[-1]) == units
    assert all(x + width == following for (x, width), (following, _) in itertools.pairwise(cells))


def test_few_units_are_drawn_one_by_one():
    strip = Strip(9, 6, np.ones(9))
    assert [x for x, _ in rectangles(strip_svg(strip, Scale.of(strip.scores)))] == list(range(9))


def test_kept_units_come_first_even_if_a_cut_one_scored_higher():
    entry = {"field": "num_attention_heads", "scope": "layer", "parent": [3], "child": [2], "importance": [[1, 9, 5]]}
    assert axes({"axes": [entry]})[0].strips[0].scores.tolist() == [9, 5, 1]
    assert axes({"axes": [{**entry, "kept": [[0, 2]]}]})[0].strips[0].scores.tolist() == [5, 1, 9]


def test_whole_model_axis_has_one_strip_and_stands_first():
    found = axes(runs.summary())
    assert found[0].whole_model
    assert [len(axis.strips) for axis in found] == [1, 30, 30, 30]
    assert found[0].per_layer == "512 of 576"
    assert found[1].per_layer == "1,152 of 1,536"


def test_layers_without_a_list_of_kept_ones_are_all_kept():
    assert layers({"layers": {"parent": 3}}) == (3, {0, 1, 2}, [])
    assert layers({"layers": {"parent": 3, "kept": []}})[1] == set()


def test_describe():
    assert describe({"num_hidden_layers": 26, "intermediate_size": [896, 1536]}) == "26 layers · 896–1,536 FFN neurons"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.71, 3.9), (0, 4e5), (99.2e6, 101.3e6), (-1e-4, 2e-4), (5, 5)])
def test_ticks_are_round_inside_and_few(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 10
    assert all(low - 1e-9 * abs(high) <= tick <= high * (1 + 1e-9) + 1e-12 for tick in found)
    assert len(set(plain(found))) == len(found)


def test_scaled_ticks_share_a_unit():
    assert scaled([0.0, 5e6, 1e7]) == ["0", "5M", "10M"]
    assert scaled([99.5e6, 100e6]) == ["99.5M", "100.0M"]


def test_evaluations_get_the_tokens_of_their_step_and_a_resumed_run_counts_once():
    log = [
        {"step": 0, "eval_loss": 5.0},
        {"step": 1, "tokens": 100, "loss": 4.0},
        {"step": 2, "tokens": 200, "loss": 9.0},
        {"step": 2, "tokens": 200, "loss": 3.0},
        {"step": 2, "eval_loss": 3.5},
    ]
    assert series(log) == ([(100, 4.0), (200, 3.0)], [(0, 5.0), (200, 3.5)])


def test_smoothing_keeps_a_straight_line_and_calms_noise():
    draw = random.Random(0)
    flat = [(float(x), 2.0) for x in range(50)]
    assert [y for _, y in smooth(flat, 5)] == pytest.approx([2.0] * 50)
    noisy = [(float(x), draw.gauss(0, 1)) for x in range(400)]
    assert max(abs(y) for _, y in smooth(noisy, 10)) < 0.5 * max(abs(y) for _, y in noisy)


def test_thinning_keeps_the_mean_and_the_end():
    points = [(float(x), float(x % 7)) for x in range(700)]
    found = thin(points, 100)
    assert len(found) == 100
    assert found[-1][0] == 699
    assert sum(y for _, y in found) / 100 == pytest.approx(3.0)


def test_losses_that_share_no_scale_get_a_panel_each():
    near = runs.metrics(60)
    assert [title for title, _ in curves(near, 900)] == ["loss in nats"]
    far = [{**record, "loss": record["loss"] / 20} if "loss" in record else record for record in near]
    assert [title for title, _ in curves(far, 900)] == ["loss on held-out text, nats per token", "training loss"]


def test_the_teachers_loss_on_the_same_text_is_the_line_to_reach():
    log = runs.metrics(60)
    assert goal(log) is None
    log[0]["eval_teacher_loss"] = 2.5
    assert goal(log) == 2.5
    [(_, drawing)] = curves(log, 900)
    [(_, without)] = curves(runs.metrics(60), 900)
    assert 'class="goal"' in drawing
    assert "teacher 2.50" in drawing
    assert 'class="goal"' not in without


def test_a_loss_that_hardly_moves_is_told_with_enough_digits():
    log = [{"step": step, "tokens": step, "eval_loss": 4.8 - 1e-4 * step} for step in range(5)]
    [(_, drawing)] = curves(log, 900)
    assert ">4.79960<" in drawing


@pytest.mark.parametrize(
    "log", [[], [{"step": 1, "loss": 2.0}], [{"loss": 1.0}] * 5, [{"step": 1, "loss": math.nan}] * 3]
)
def test_nothing_is_drawn_from_fewer_than_two_points(log):
    assert curves(log, 900) == []


@pytest.mark.parametrize("width", [960, 340])
def test_every_mark_lies_inside_the_drawing(width):
    tried = candidates(runs.summary())
    for drawing in [scatter(tried, width), *(drawing for _, drawing in curves(runs.metrics(), width))]:
        box = [float(side) for side in re.search(r'viewBox="([^"]+)"', drawing).group(1).split()]
        places = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", drawing)]
        places += [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawing)]
        assert len(places) > 5
        assert all(0 <= x <= box[2] and 0 <= y <= box[3] for x, y in places)


def test_the_line_joins_what_no_other_shape_beats():
    points = [(5.0, 1.0), (3.0, 2.0), (4.0, 2.0), (4.0, 1.5), (6.0, 1.0), (3.0, 3.0)]
    front = pareto(points)
    assert front == [(3.0, 2.0), (4.0, 1.5), (5.0, 1.0)]
    for params, loss in points:
        beaten = any(p <= params and q <= loss and (p, q) != (params, loss) for p, q in points)
        assert ((params, loss) in front) != beaten


def test_shapes_measured_on_the_way_are_drawn_but_not_listed():
    measured = [{"shape": {"hidden_size": 500}, "params": 120e6, "loss": 3.1}]
    summary = runs.summary() | {"measured": measured}
    assert candidates(summary) == candidates(runs.summary())
    drawn = scatter(candidates(summary) + others(summary), 400)
    assert drawn.count("<circle") == scatter(candidates(summary), 400).count("<circle") + 1
    assert 'class="front"' in drawn


def test_candidates_are_ordered_by_loss_and_the_childs_shape_is_chosen():
    found = candidates(runs.summary())
    assert [one.loss for one in found] == sorted(one.loss for one in found)
    assert [one.shape["num_hidden_layers"] for one in found if one.chosen] == [26]
    summary = runs.summary()
    summary["candidates"][4]["chosen"] = True
    assert [one.shape["num_hidden_layers"] for one in candidates(summary) if one.chosen] == [24]


def test_what_a_short_training_showed_decides_the_order(tmp_path):
    summary = runs.summary()
    page = write_report(runs.write_run(tmp_path / "plain", summary)).read_text()
    assert "distilled briefly" not in page
    for place, (loss, tokens) in {5: (4.1, 2000), 3: (4.2, 2000), 0: (4.05, 1000)}.items():
        summary["candidates"][place] |= {"trained_loss": loss, "trained_tokens": tokens}
    shapes = [one["shape"] for one in summary["candidates"]]
    assert [shapes.index(one.shape) for one in candidates(summary)] == [5, 3, 0, 1, 2, 4, 6, 7, 8, 9]
    page = write_report(runs.write_run(tmp_path / "trained", summary)).read_text()
    assert "distilled briefly" in page
    assert "<td>4.050</td><td>1,000</td>" in page


def test_one_candidate_is_no_chart():
    assert scatter(candidates({"candidates": runs.candidates()[:1]}), 400) == ""
