"""The run folder: results are kept and read back, other settings are refused, nothing is ever half written."""

from dataclasses import dataclass, field

import pytest
import yaml

from nestling.distill import DistillSettings
from nestling.errors import CheckpointError
from nestling.recipes.run import Run, check_folder, read_json


@dataclass
class Settings:
    model: str = "tiny"
    seed: int = 0
    sizes: tuple[int, ...] = (1, 2)
    out: str = "run"
    overwrite: bool = False


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_settings_are_written_first(tmp_path):
    Run("prune", Settings(), tmp_path / "deep" / "run")
    record = yaml.safe_load((tmp_path / "deep" / "run" / "run.yaml").read_text())
    assert record == {"verb": "prune", "model": "tiny", "seed": 0, "sizes": [1, 2], "out": "run", "overwrite": False}


def test_a_kept_stage_is_read_and_not_done_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    for _ in range(3):
        assert Run("prune", Settings(), tmp_path / "run").values("stage.json", make) == {"value": 1}
    assert len(made) == 1
    assert names(tmp_path / "run") == ["run.yaml", "stage.json"]


def test_an_interrupted_job_goes_on_after_its_last_whole_stage(tmp_path):
    done = []

    def job(interrupt):
        run = Run("prune", Settings(), tmp_path / "run")

        def second():
            done.append("second")
            if interrupt:
                raise KeyboardInterrupt
            return 2

        return run.values("first.json", lambda: done.append("first") or 1), run.values("second.json", second)

    with pytest.raises(KeyboardInterrupt):
        job(interrupt=True)
    assert names(tmp_path / "run") == ["first.json", "run.yaml"]
    assert job(interrupt=False) == (1, 2)
    assert done == ["first", "second", "second"]


def test_a_stage_may_be_a_folder(tmp_path):
    def save(text, path):
        path.mkdir()
        (path / "text").write_text(text)

    run = Run("prune", Settings(), tmp_path / "run")
    for text in ("one", "two"):
        kept = run.stage("model", lambda text=text: text, save, lambda path: (path / "text").read_text())
        assert kept == "one"


@pytest.mark.parametrize(("change", "name"), [({"seed": 1}, "seed=0, not 1"), ({"sizes": (3,)}, r"sizes=\[1, 2\]")])
def test_other_settings_are_refused(tmp_path, change, name):
    Run("prune", Settings(), tmp_path / "run").write("kept.txt", "kept")
    with pytest.raises(CheckpointError, match=rf"holds a run with {name}.*--overwrite"):
        Run("prune", Settings(**change), tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a run with verb=prune, not rank"):
        Run("rank", Settings(), tmp_path / "run")
    assert (tmp_path / "run" / "kept.txt").read_text() == "kept"


@dataclass
class Later(Settings):
    """A later version's settings: one more, and those of a training in them."""

    axes: str = ""
    distill: DistillSettings = field(default_factory=DistillSettings)


def test_a_folder_from_before_a_setting_goes_on_with_its_default(tmp_path):
    Run("prune", Settings(), tmp_path / "run")
    Run("prune", Later(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a run with axes=, not hidden_size: name another folder"):
        Run("prune", Later(axes="hidden_size"), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"distill\.learning_rate=0\.0002, not 0\.1"):
        Run("prune", Later(distill=DistillSettings(learning_rate=0.1)), tmp_path / "run")


def test_how_often_a_training_saves_may_change(tmp_path):
    Run("prune", Later(), tmp_path / "run")
    Run("prune", Later(distill=DistillSettings(save_every=7)), tmp_path / "run")


def test_where_a_job_runs_may_change(tmp_path):
    Run("prune", Settings(), tmp_path / "run")
    Run("prune", Settings(out="elsewhere", overwrite=True), tmp_path / "run")


def test_overwrite_starts_anew(tmp_path):
    Run("prune", Settings(), tmp_path / "run").write("kept.txt", "kept")
    Run("prune", Settings(seed=1), tmp_path / "run", overwrite=True)
    assert names(tmp_path / "run") == ["run.yaml"]


def test_what_a_job_is_given_is_not_removed_with_the_run_it_lies_in(tmp_path):
    """`compress runs/a/model --out runs/a --overwrite` would have removed the parent that it cuts."""
    Run("prune", Settings(), tmp_path / "run").write("model", "parent")
    for given in ("run/model", "elsewhere"):
        settings = Settings(model=str(tmp_path / given))
        if given == "elsewhere":  # negative control
            Run("prune", settings, tmp_path / "run", overwrite=True)
            continue
        with pytest.raises(CheckpointError, match=r"run/model' is in .*, which --overwrite would remove"):
            Run("prune", settings, tmp_path / "run", overwrite=True)
        assert names(tmp_path / "run") == ["model", "run.yaml"]
    assert names(tmp_path / "run") == ["run.yaml"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_no_run_is_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("work")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        Run("prune", Settings(), tmp_path, overwrite=overwrite)
    with pytest.raises(CheckpointError, match="is a file: name a folder"):
        Run("prune", Settings(), tmp_path / "thesis.txt", overwrite=overwrite)
    with pytest.raises(CheckpointError, match="cannot be made"):
        Run("prune", Settings(), tmp_path / "thesis.txt" / "run", overwrite=overwrite)
    assert names(tmp_path) == ["thesis.txt"]


def test_damaged_files_are_named(tmp_path):
    run = Run("prune", Settings(), tmp_path / "run")
    run.write("stage.json", '{"cut')
    with pytest.raises(CheckpointError, match=r"stage\.json' is damaged: delete it"):
        run.values("stage.json", dict)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_json(run.path("stage.json"))
    run.write("run.yaml", "verb: [prune")
    with pytest.raises(CheckpointError, match=r"run\.yaml' is damaged: start anew with --overwrite"):
        Run("prune", Settings(), tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "where"), [("run", "is what"), ("run/part", "is in '.*run', which"), ("other", None)]
)
def test_a_model_is_not_replaced_by_what_is_made_of_it(tmp_path, given, where):
    for folder in ("run/part", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    settings = Settings(model=str(tmp_path / given), out=str(tmp_path / "run"), overwrite=True)
    if where is None:  # negative control
        check_folder(settings)
        return
    with pytest.raises(CheckpointError, match=f"{where} --overwrite would remove: name another folder with --out"):
        check_folder(settings)
