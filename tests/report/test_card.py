"""The model card: front matter that the hub reads, and only what the run knows."""

import pytest
import yaml
from huggingface_hub import ModelCard

from nestling.errors import CheckpointError
from nestling.report import write_model_card
from nestling.report.card import front_matter, hub_id
from tests.report import runs


def card(tmp_path, **changes) -> str:
    path = write_model_card(runs.write_run(tmp_path / "run", {**runs.summary(), **changes}))
    assert path == tmp_path / "run" / "model" / "README.md"
    return path.read_text()


def test_hub_library_reads_it(tmp_path):
    parent = {**runs.summary()["parent"], "name": "owner/parent-135M", "license": "apache-2.0", "language": ["en"]}
    data = ModelCard(card(tmp_path, parent=parent)).data
    assert data.base_model == "owner/parent-135M"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["nestling", "pruned", "distilled"]
    assert (data.license, data.language) == ("apache-2.0", ["en"])


def test_nothing_is_claimed_that_the_run_does_not_know(tmp_path):
    text = card(tmp_path)
    header = yaml.safe_load(text.split("---")[1])
    assert not {"base_model", "license", "language", "datasets"} & set(header)
    assert "0.1.0" in text


def test_table_and_command_are_in_it(tmp_path):
    text = card(tmp_path)
    assert "| parameters | 134.5M | 99.9M | 99.9M | 0.74x |" in text
    assert f"```sh\n{runs.COMMAND}\n```" in text
    assert "26 of 30 layers, 512 of 576 hidden channels, 1,152 of 1,536 FFN neurons, 6 of 9 query heads" in text
    assert "1.24x the parent's on stdlib" in text


@pytest.mark.parametrize("needs", [True, False])
def test_import_of_nestling_only_where_needed(tmp_path, needs):
    text = card(tmp_path, needs_nestling=needs)
    assert ("\nimport nestling" in text) == needs
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_pruned_only(tmp_path):
    assert front_matter({"data": {"distill_tokens": 0}})["tags"] == ["nestling", "pruned"]


@pytest.mark.parametrize("name", ["builtin:stdlib", "data/wiki.jsonl", "/abs/path", "plain", "a/b/c", "../x", ""])
def test_what_is_no_hub_id(name):
    assert hub_id(name) is None


def test_local_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "child").mkdir(parents=True)
    assert hub_id("out/child") is None
    assert hub_id("owner/model") == "owner/model"


def test_names_cannot_break_out(tmp_path):
    summary = runs.summary()
    child = {**summary["child"], "name": "x\n---\nlicense: mit\n<script>"}
    child["evaluation"] = {"a|b\n# c": {"perplexity": 2.0}}
    text = card(tmp_path, child=child, command="echo ```\n````")
    assert "license" not in yaml.safe_load(text.split("\n---\n")[0].removeprefix("---"))
    assert "<script>" not in text
    assert "\n# c" not in text
    assert "`````sh\n" in text


@pytest.mark.parametrize("missing", sorted(runs.summary()))
def test_any_part_may_be_missing(tmp_path, missing):
    summary = runs.summary()
    del summary[missing]
    path = write_model_card(runs.write_run(tmp_path / "run", summary))
    ModelCard(path.read_text())


def test_no_card_without_a_model(tmp_path):
    folder = runs.write_run(tmp_path / "run")
    (folder / "model").rmdir()
    with pytest.raises(CheckpointError, match="no model folder"):
        write_model_card(folder)
    assert not (folder / "model").exists()
