"""The page: valid and self-contained, nothing unescaped, what is missing left out, the picture true to the numbers."""

import json
import re
from html.parser import HTMLParser

import pytest

from nestling.errors import CheckpointError
from nestling.report import write_report
from nestling.report.run import Run
from tests.report import runs

VOID = {"meta", "link", "br", "hr", "img", "input"}
LOADING = {"src", "href", "srcset", "action", "poster", "data", "xlink:href"}


class Page(HTMLParser):
    """Checks nesting and collects what a test asks for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def has(self, name: str) -> bool:
        return any(attributes.get("id") == name for _, attributes in self.elements)

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]

    @property
    def text(self) -> str:
        return "".join(self.words)


def page(folder, summary=None, log=None) -> Page:
    return Page(write_report(runs.write_run(folder / "run", summary, log)).read_text())


SECTIONS = ("comparison", "model", "curve", "candidates", "samples", "again")


def test_complete_run_has_every_section(tmp_path):
    found = page(tmp_path)
    assert all(found.has(name) for name in SECTIONS)
    assert runs.COMMAND in found.text
    assert "learning_rate: 0.0002" in found.text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = write_report(runs.write_run(tmp_path / "run")).read_text()
    for tag, attributes in Page(text).elements:
        assert tag not in {"iframe", "object", "embed", "base"}
        assert all(value in ("", "data:,") for name, value in attributes.items() if name in LOADING), (tag, attributes)
    assert not re.search(r"https?://|url\(|@import", text)


@pytest.mark.parametrize(
    "where", [("title",), ("command",), ("machine",), ("parent", "name"), ("data", "train"), ("versions", "torch")]
)
def test_names_are_escaped(tmp_path, where):
    evil = "</code><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
    summary = runs.summary()
    place = summary
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = evil
    found = page(tmp_path, summary)
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert "img" not in [tag for tag, _ in found.elements]
    assert evil in found.text


def test_samples_candidates_axes_and_settings_are_escaped(tmp_path):
    evil = '"><script>alert(1)</script>'
    summary = runs.summary()
    summary["samples"] = [{"prompt": evil, "parent": evil + "p", "child": "\u202e" + evil}]
    summary["axes"][0]["field"] = evil
    summary["candidates"][0]["shape"][evil] = 3
    summary["child"]["evaluation"][evil] = {"perplexity": 3.0}
    folder = runs.write_run(tmp_path / "run", summary)
    (folder / "run.yaml").write_text(evil)
    found = Page(write_report(folder).read_text())
    assert [tag for tag, _ in found.elements].count("script") == 1


def test_policy_names_the_one_script(tmp_path):
    import base64
    import hashlib

    text = write_report(runs.write_run(tmp_path / "run")).read_text()
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


@pytest.mark.parametrize("missing", sorted(runs.summary()))
def test_any_part_may_be_missing(tmp_path, missing):
    summary = runs.summary()
    del summary[missing]
    page(tmp_path, summary)


@pytest.mark.parametrize("missing", ["cost", "evaluation", "speed", "pruned", "config", "name"])
@pytest.mark.parametrize("who", ["parent", "child"])
def test_parts_of_a_model_may_be_missing(tmp_path, who, missing):
    summary = runs.summary()
    summary[who].pop(missing, None)
    assert "None" not in page(tmp_path, summary).text


@pytest.mark.parametrize("wrong", [None, 7, "text", [], {}, [None], [[]], {"a": None}, True, float("nan"), -1])
@pytest.mark.parametrize("part", sorted(runs.summary()))
def test_a_part_of_the_wrong_kind_counts_as_missing(tmp_path, part, wrong):
    page(tmp_path, {**runs.summary(), part: wrong})


@pytest.mark.parametrize(
    "wrong",
    [None, 7, "text", [], [None] * 30, [1e400, float("nan")], [[1e400, 1.0, -1e400]] * 30, {}, [[None, "x"]] * 30, -1],
)
@pytest.mark.parametrize("key", ["field", "scope", "parent", "child", "importance", "kept"])
def test_an_axis_may_be_half_there(tmp_path, key, wrong):
    summary = runs.summary()
    for axis in summary["axes"]:
        axis[key] = wrong
    page(tmp_path, summary)


def test_empty_summary_gives_the_curve_alone(tmp_path):
    found = page(tmp_path, {})
    assert [name for name in SECTIONS if found.has(name)] == ["curve", "again"]


def test_no_curve_from_one_point(tmp_path):
    assert not page(tmp_path, log=[{"step": 1, "tokens": 10, "loss": 2.0}]).has("curve")


def test_hatched_units_are_the_cut_units(tmp_path):
    found = page(tmp_path)
    drawn = sum(int(mark["data-cut"]) for mark in found.of_class("cut") if "data-cut" in mark)
    axes = runs.summary()["axes"]
    total = sum(sum(a["parent"]) - sum(a["child"]) for a in axes if a["scope"] == "layer")
    assert drawn == total + 576 - 512


def test_hatched_width_is_the_cut_share(tmp_path):
    marks = [mark for mark in page(tmp_path).of_class("cut") if mark.get("data-cut") == "384"]
    assert len(marks) == runs.LAYERS - len(runs.DROPPED)
    assert {mark["style"] for mark in marks} == {"width:25.0%"}


def test_dropped_layers_are_struck(tmp_path):
    found = page(tmp_path)
    rows = [mark["class"] for mark in found.of_class("row") if "head" not in mark["class"]]
    assert tuple(layer for layer, kind in enumerate(rows) if "dropped" in kind) == runs.DROPPED


def test_chosen_candidate_is_marked_once(tmp_path):
    assert len(page(tmp_path).of_class("chosen")) == 3  # a row of the table, and a point in each size of the chart


def test_large_model_stays_small_on_the_page(tmp_path):
    layers, units = 100, 20_000
    scores = [[1 + (unit * 7919 + layer) % units for unit in range(units)] for layer in range(layers)]
    summary = runs.summary()
    summary["layers"] = {"parent": layers, "kept": list(range(layers)), "importance": [0.5] * layers}
    sizes = {"parent": [units] * layers, "child": [15_000] * layers, "importance": scores}
    summary["axes"] = [
        {"field": "intermediate_size", "scope": "layer", **sizes},
        runs.axis("num_attention_heads", 64, 48, layers, ()),
        runs.axis("num_key_value_heads", 8, 8, layers, ()),
        runs.axis("num_experts", 128, 96, layers, ()),
    ]
    written = write_report(runs.write_run(tmp_path / "run", summary, runs.metrics(20_000)))
    assert written.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("name", "text"),
    [("summary.json", '{"title": '), ("summary.json", "[1]"), ("metrics.jsonl", '{"step": 1}\n{"st\n{}\n')],
)
def test_damaged_files_are_named_in_one_sentence(tmp_path, name, text):
    folder = runs.write_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(name)) as error:
        write_report(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "report.html").exists()


def test_unfinished_last_line_of_a_killed_run_is_left_out(tmp_path):
    folder = runs.write_run(tmp_path / "run", log=[{"step": 1, "loss": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert len(Run.read(folder).metrics) == 1


def test_missing_folder_and_folder_without_a_run(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a run folder"):
        write_report(tmp_path)


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = runs.write_run(tmp_path / "run")
    write_report(folder)
    before = (folder / "report.html").read_bytes()
    (folder / "summary.json").write_text(json.dumps({"title": "second"}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestling.runs.write.os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".report*"))


@pytest.mark.parametrize("wrong", [1e400, -3, None, "x", [1e400], [None, 2, 99]])
@pytest.mark.parametrize("key", ["parent", "kept", "importance"])
def test_layers_may_be_half_there(tmp_path, key, wrong):
    summary = runs.summary()
    summary["layers"][key] = wrong
    page(tmp_path, summary)
