"""The routers' part of the page: evenness on constructed loads, a bar for each expert, and half a summary."""

import pytest

from nestling.report import write_report
from nestling.report.routers import evenness, routers
from tests.report import runs

LOG = [{"step": i, "loss": 3.0 - i / 9, "max_load": 2.0 - i / 20, "entropy": 0.9, "dead": i % 2 / 8} for i in range(9)]


def test_evenness_on_constructed_loads():
    assert evenness([5, 5, 5, 5]) == pytest.approx((1, 1, 0))
    assert evenness([8, 0, 0, 0]) == pytest.approx((4, 0, 0.75))


def test_a_layer_shows_each_expert_busiest_first():
    found = routers({"load": {"per_layer": [[1, 4, 3]], "layers": [2]}}, [], (400,))
    (row,) = found["rows"]
    assert (row["number"], row["busiest"], row["dead"]) == (2, "1.50", 0)
    places = [row["svg"].index(f"expert {expert}:") for expert in (1, 2, 0)]
    assert places == sorted(places)


def test_figures_that_never_change_are_not_drawn():
    titles = [title for title, _ in routers({}, LOG, (400,))["curves"][0]]
    assert titles == ["busiest expert over the mean", "part of the experts without a token"]


@pytest.mark.parametrize("load", [{}, None, {"per_layer": "x"}, {"per_layer": [None, [], [1e400, "a"], [0, 0]]}])
def test_what_is_missing_is_left_out(tmp_path, load):
    folder = runs.write_run(tmp_path / "run", {"title": "mixture", "load": load}, [{"step": 1, "loss": 1.0}])
    assert 'id="routers"' not in write_report(folder).read_text()


def test_the_page_has_both(tmp_path):
    folder = runs.write_run(tmp_path / "run", {"title": "mixture", "load": {"per_layer": [[3, 1]] * 2}}, LOG)
    text = write_report(folder).read_text()
    assert text.count('class="loads"') == 2
    assert "busiest expert over the mean over steps" in text
