"""The comparison, its figures, and how they are written."""

import math

import pytest
from rich.console import Console

from nestling.report import comparison, human
from nestling.report.headline import headline
from nestling.report.rows import compare
from tests.report import runs


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (human.count(134_515_008), "134.5M"),
        (human.count(1536), "1,536"),
        (human.count(24_576), "24.6K"),
        (human.count(999_960), "1M"),
        (human.count(7e9), "7B"),
        (human.count(8_030_000_000), "8.03B"),
        (human.count(None), "–"),
        (human.size(512 * 2**20), "512 MiB"),
        (human.size(269_030_016), "256.6 MiB"),
        (human.size(1023.99 * 2**20), "1 GiB"),
        (human.size(12), "12 B"),
        (human.flops(1.3e9), "1.3 GFLOP"),
        (human.ratio(0.744), "0.74x"),
        (human.ratio(12.34), "12.3x"),
        (human.ratio(None), "–"),
        (human.figure(84.31), "84.3"),
        (human.figure(8.2349), "8.23"),
        (human.figure(1234.5), "1,234"),
        (human.figure(math.inf), "∞"),
        (human.figure(math.nan), "–"),
        (human.figure(0), "0"),
        (human.figure(3.2e-7), "3.2e-07"),
    ],
)
def test_figures_are_written_for_people(written, expected):
    assert written == expected


def test_ratios_are_child_over_parent():
    rows = {row.label: row for row in compare(runs.summary()).rows}
    assert rows["parameters"].ratio == pytest.approx(99_862_848 / 134_515_008)
    assert rows["perplexity, stdlib"].ratio == pytest.approx(17.12 / 13.82)
    assert rows["decode, tokens/s"].ratio == pytest.approx(50.27 / 38.41)
    assert [rows[name].verdict for name in ("parameters", "perplexity, stdlib", "decode, tokens/s")] == [
        "better",
        "worse",
        "better",
    ]


def test_stages_follow_what_was_measured():
    summary = runs.summary()
    assert compare(summary).stages == ("parent", "pruned", "distilled")
    del summary["child"]["evaluation"]
    assert compare(summary).stages == ("parent", "pruned")
    del summary["child"]["pruned"]
    assert compare(summary).stages == ("parent", "child")
    assert compare({}).rows == ()


def test_active_parameters_and_state_only_where_they_say_something():
    summary = runs.summary()
    labels = [row.label for row in compare(summary).rows]
    assert "active parameters" not in labels
    assert "state" not in labels
    summary["child"]["cost"] |= {"active_params": 5, "state_bytes": 9}
    labels = [row.label for row in compare(summary).rows]
    assert {"active parameters", "state"} <= set(labels)


def printed(summary, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison(summary))
    return console.export_text().splitlines()


def test_table_fits_sixty_columns_without_losing_a_figure():
    lines = printed(runs.summary(), 60)
    assert all(len(line) <= 60 for line in lines)
    assert "…" not in "".join(lines)
    row = next(line for line in lines if line.startswith("weights"))
    assert row.split() == ["weights", "256.6", "MiB", "190.5", "MiB", "190.5", "MiB", "0.74x"]


def test_table_does_not_read_names_as_markup():
    summary = runs.summary()
    summary["child"]["evaluation"]["[red]x[/nope]"] = {"perplexity": 2.0}
    assert any("[red]x" in line or "nope]" in line for line in printed(summary, 100))


def test_headline_takes_the_validation_data():
    summary = runs.summary()
    summary["data"]["validation"] = "data/wikitext-103.jsonl"
    tiles = {tile.label: tile for tile in headline(summary)}
    assert tiles["perplexity"].value == "33.9"
    assert [width for _, _, width in tiles["parameters"].bars] == pytest.approx([100, 74.24], abs=0.01)
    assert headline({}) == []


def test_a_model_that_became_of_nothing_else_has_a_column_of_its_own():
    one = {"cost": {"params": 10, "active_params": 4}, "evaluation": {"builtin:stdlib": {"perplexity": 7.0}}}
    found = compare(one)
    assert found.stages == ("model",)
    assert not found.paired
    assert [(row.label, row.values) for row in found.rows if row.values[0]] == [
        ("parameters", (10,)),
        ("active parameters", (4,)),
        ("perplexity, stdlib", (7.0,)),
    ]
    assert [tile.value for tile in headline(one)] == ["7.00"]
