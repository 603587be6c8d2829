"""A family: members keep their budgets, share what can be shared, go on after a stop, and stand in one table."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestling.cli import main
from nestling.ranking import Ranking
from nestling.recipes import child
from tests.checkpoint import TEMPLATE
from tests.cli.workplace import JOB, brief, files, original, place, run

__all__ = ["brief", "original", "place"]

FAMILY = ["family", "m", "--to", "0.7x", "0.9x", "--axes", "intermediate_size", "--out", "run", *JOB]


def weights(folder):
    return {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("origin", ["parent", "previous"])
def test_members_keep_their_budgets_and_stand_in_one_table(origin, place, brief, capsys, monkeypatch):
    ranked, real = [], child.rank
    monkeypatch.setattr(
        child, "rank", lambda model, *a, **k: ranked.append(model.num_parameters()) or real(model, *a, **k)
    )
    summary = run(capsys, *FAMILY, "--from", origin)
    assert [member["name"] for member in summary["members"]] == ["0.9x", "0.7x"], "the largest member comes first"
    assert [member["cut_from"] for member in summary["members"]] == [
        "parent",
        "parent" if origin == "parent" else "0.9x",
    ]
    for member, share in zip(summary["members"], (0.9, 0.7), strict=True):
        loaded = AutoModelForCausalLM.from_pretrained(place / "run" / member["model"])
        assert loaded.num_parameters() == member["cost"]["params"] <= share * 59664
        assert AutoTokenizer.from_pretrained(place / "run" / member["model"]).chat_template == TEMPLATE
        assert (place / "run" / member["folder"] / "report.html").exists()
    first = summary["members"][0]["cost"]["params"]
    assert ranked == ([59664] if origin == "parent" else [59664, first]), "one ranking for each model that is cut"
    page = (place / "run" / "report.html").read_text()
    assert all(f'href="members/{name}/report.html"' in page for name in ("0.9x", "0.7x"))
    assert page.index(">0.9x</th>") < page.index(">0.7x</th>")


def test_what_is_shared_is_made_once(place, brief, capsys):
    run(capsys, *FAMILY)
    kept = files(place / "run")
    assert {"calibration.safetensors", "ranking.safetensors", "evaluation-parent.json", "losses.json"} <= kept
    inside = {name.rsplit("/", 1)[-1] for name in kept if name.startswith("members/")}
    assert not inside & {"calibration.safetensors", "ranking.safetensors", "evaluation-parent.json", "losses.json"}


def test_a_member_is_what_compress_makes(place, brief, capsys):
    """The negative control is the ranking: members cut by another one differ."""
    run(capsys, *FAMILY)
    alone = ["compress", "m", "--to", "0.9x", "--axes", "intermediate_size", "--out", "alone", *JOB]
    run(capsys, *alone)
    assert weights(place / "alone" / "model") == weights(place / "run" / "members" / "0.9x" / "model")
    one, other = (Ranking.load(place / name / "ranking.safetensors") for name in ("alone", "run"))
    assert one.fingerprint == other.fingerprint
    run(capsys, *alone, "--out", "other", "--metric", "activation")
    assert weights(place / "other" / "model") != weights(place / "run" / "members" / "0.9x" / "model")


def test_the_teacher_is_corrected_once_for_all(place, brief, capsys, monkeypatch):
    """Every member learns from it as `compress` would; without a correction they differ."""
    corrections, real = [], child.corrected
    monkeypatch.setattr(child, "corrected", lambda *a: corrections.append(1) or real(*a))
    first = ["--distill.correction", "first", "--distill.correct_rate", "1.0"]
    run(capsys, *FAMILY, *first)
    assert len(corrections) == 1
    assert not {name for name in files(place / "run") if "teacher/" in name or "correction/" in name}
    alone = ["compress", "m", "--to", "0.7x", "--axes", "intermediate_size", *JOB]
    run(capsys, *alone, "--out", "alone", *first, "--distill.keep_teacher", "true")
    assert (place / "alone" / "teacher" / "config.json").exists()
    member = weights(place / "run" / "members" / "0.7x" / "model")
    assert weights(place / "alone" / "model") == member
    run(capsys, *alone, "--out", "plain")
    assert weights(place / "plain" / "model") != member


def test_a_stopped_family_goes_on(place, brief, capsys, monkeypatch):
    real, calls = child.distill, []

    def second_fails(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(child, "distill", second_fails)
    assert main(FAMILY) == 130
    assert json.loads((place / "run" / "members" / "0.9x" / "summary.json").read_text())
    assert not (place / "run" / "members" / "0.7x" / "model").exists()
    assert len(run(capsys, *FAMILY)["members"]) == 2
    assert len(calls) == 3, "the member that was finished is not made again"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "0.5x", "0.5x"], "the targets 0.5x 0.5x are not one for each member: give --to 0.75x 0.5x"),
        (["--to", "0.5x", "2x"], "the target params=2x is not below the parent's 59,664: ask for less"),
        (["--to", "0.5x", "0.01x"], "no shape of this model keeps 0.01x"),
        (["--to", "0.5x", "--from", "uncle"], "--from uncle is not possible: choose parent or previous"),
    ],
)
def test_bad_families_are_refused_before_any_work(arguments, sentence, place, capsys):
    before = files(place)
    assert main(["family", "m", *arguments, *JOB]) == 2
    assert sentence in capsys.readouterr().err
    assert files(place) == before


def test_members_share_the_parents_likeliest_tokens(place, brief, capsys):
    """Kept tokens give what a live teacher with the same top_k gives, to the rounding of what is kept."""
    top = ["--distill.top_k", "20"]
    run(capsys, *FAMILY, *top)
    assert (place / "run" / "teacher_tokens" / "cache.json").exists()
    alone = ["compress", "m", "--to", "0.9x", "--axes", "intermediate_size", "--out", "alone", *JOB, *top]
    run(capsys, *alone)
    found, expected = (
        load_file(place / folder / "model" / "model.safetensors") for folder in ("run/members/0.9x", "alone")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-3, rtol=0)
