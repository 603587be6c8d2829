"""What may be typed short is what the parser would want in full; everything else is left as it was."""

from dataclasses import dataclass, field

import pytest

from nestling.cli.arguments import meant, near, options, spelled_out
from nestling.train import TrainSettings


@dataclass
class Settings:
    model: str
    to: list[str] = field(default_factory=list)
    overwrite: bool = False
    stride: int | None = None
    train: TrainSettings = field(default_factory=TrainSettings)


KINDS = options(Settings)
SPELLED = {
    "--to 0.75x 0.5x --overwrite": ['--to=["0.75x", "0.5x"]', "--overwrite=true"],
    "--to=0.5x": ['--to=["0.5x"]'],
    '--to ["0.5x"]': ["--to", '["0.5x"]'],
    "--overwrite m": ["--overwrite=true", "m"],
    "--overwrite false m": ["--overwrite", "false", "m"],
    "--overwrite=no": ["--overwrite=no"],
    "--train.bf16 --stride 4Ki": ["--train.bf16=true", "--stride=4096"],
    "--train.tokens 2M": ["--train.tokens=2000000"],
    "--train.tokens=1.5k --train.steps 1e3": ["--train.tokens=1500", "--train.steps=1000"],
    "--train.tokens 200_000": ["--train.tokens=200_000"],
    "--train.tokens 2.5": ["--train.tokens=2.5"],
    "--train.tokens lots": ["--train.tokens=lots"],
    "--stride -5": ["--stride", "-5"],
    "--train.learning_rate 1e-3 a=b": ["--train.learning_rate", "1e-3", "a=b"],
    "--from previous --json": ["--each_from", "previous", "--json"],
}


@pytest.mark.parametrize("typed", SPELLED)
def test_what_is_typed_short_is_spelled_out(typed):
    assert spelled_out(typed.split(), KINDS) == SPELLED[typed]


def test_options_of_nested_settings_are_known_with_their_types():
    assert KINDS["--train.tokens"] is int
    assert "--train" not in KINDS


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unrecognized arguments: --strde 3", "perhaps --stride was meant"),
        ("unrecognized arguments: x --tokens=3", "perhaps --train.tokens was meant"),
        ("unrecognized arguments: --train.batch-size 3", "perhaps --train.batch_size was meant"),
        ("unrecognized arguments: --learning_rat 3", "perhaps --train.learning_rate was meant"),
        ("Subcommand 'rank' does not accept option 'train.tokns'", "perhaps train.tokens was meant"),
        ("unrecognized arguments: --sideways 3", None),
        ("argument --model: expected one argument", None),
    ],
)
def test_an_option_that_there_is_not_is_taken_for_the_nearest(message, expected):
    assert meant(message, KINDS) == expected


def test_a_verb_that_there_is_not_is_taken_for_the_nearest():
    verbs = ("rank", "compress", "moe prune", "moe train")
    assert near(["compres", "m"], verbs) == "perhaps compress was meant"
    assert near(["moe", "trian"], verbs) == "perhaps moe train was meant"
    assert near(["moe"], verbs) == "perhaps moe prune or moe train was meant"
    assert near(["squeeze"], verbs) == "there are rank, compress, moe prune, moe train"
