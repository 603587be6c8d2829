"""Settings are compared one by one and by value; what is new since counts as its default."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from nestling.runs import difference, plain


@dataclass
class Inner:
    FREE = ("log_every",)

    rate: float = 1e-4
    log_every: int = 1
    states: list[str] = field(default_factory=list)


@dataclass
class Settings:
    FORMER: ClassVar = {"text": "data"}

    model: str
    data: str = "builtin:stdlib"
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=Inner)
    out: str = "run"


MINE = Settings("tiny")


def test_the_same_settings_agree():
    assert difference(plain(MINE), MINE) is None
    assert difference(plain(asdict(MINE)), Settings("tiny", sizes=(1, 2))) is None


@pytest.mark.parametrize("missing", ["data", "sizes", "inner", "out"])
def test_what_is_new_since_counts_as_its_default(missing):
    before = plain(MINE)
    del before[missing]
    assert difference(before, MINE) is None


def test_what_is_new_since_and_not_its_default_is_a_difference():
    """Negative control."""
    before = plain(MINE)
    del before["data"], before["inner"]["states"]
    assert difference(before, Settings("tiny", data="x")) == "data=builtin:stdlib, not x"
    assert difference(before, Settings("tiny", inner=Inner(states=["output"]))) == "inner.states=[], not ['output']"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Settings("other"), "model=tiny, not other"),
        (Settings("tiny", sizes=(1,)), r"sizes=[1, 2], not [1]"),
        (Settings("tiny", inner=Inner(rate=2e-4)), "inner.rate=0.0001, not 0.0002"),
        (Settings("tiny", out="elsewhere"), "out=run, not elsewhere"),
    ],
)
def test_a_real_difference_is_named_with_both_values(now, words):
    assert difference(plain(MINE), now) == words


def test_what_does_not_change_the_result_may_differ():
    assert difference(plain(MINE), Settings("tiny", inner=Inner(log_every=5))) is None
    assert difference(plain(MINE), Settings("tiny", out="elsewhere"), free=("out",)) is None


def test_a_default_that_changed_since_is_a_difference():
    """A run keeps all of its settings, so that what it was made with does not hang on today's defaults."""
    before = plain(MINE) | {"data": "a former default"}
    assert difference(before, MINE) == "data=a former default, not builtin:stdlib"


def test_a_setting_that_is_gone_is_a_difference_unless_it_has_another_name():
    assert difference(plain(MINE) | {"gone": 3}, MINE) == "gone=3, which is no setting of this job"
    before = {"text" if name == "data" else name: value for name, value in plain(MINE).items()}
    assert difference(before, MINE) is None
    assert difference(before | {"text": "x"}, MINE) == "data=x, not builtin:stdlib"


def test_one_that_must_be_given_and_was_not_kept_is_a_difference():
    assert difference({}, MINE) == "model=None, not tiny"


def test_plain_values_are_those_of_files():
    assert plain({"a": (1, 2), "b": Path("x")}) == {"a": [1, 2], "b": "x"}
