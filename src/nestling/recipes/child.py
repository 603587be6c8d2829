"""How one child is made: the stages that `compress` runs once and `family` for every member.

A `Parent` is the model that a job starts from, with its texts and figures. An `Origin` is a model that children are
cut from: the parent, or the child before. A `Child` is made from an origin in a run folder, stage by stage; what is in
the folder is not done again. Knows nothing of how many children a job has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from nestling import evaluate, hub, processes
from nestling.anatomy import Anatomy
from nestling.data import batches, documents
from nestling.distill import DistillSettings, corrected, distill, leave
from nestling.evaluate.pairs import read_pairs
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import bar, console
from nestling.recipes.run import KeptFigures, Run
from nestling.recipes.settings import ShapeSettings, at_least, check_metrics, listed
from nestling.recipes.shapes import Ground, Target
from nestling.recipes.source import Source, in_batches, measured
from nestling.search import Candidate, Trial, token_loss
from nestling.shape import Shape
from nestling.surgery import prune
from nestling.surgery.choose import check_ranking
from nestling.surgery.kernels import kernel_word
from nestling.surgery.merge import check_merge
from nestling.surgery.repair import Repair
from nestling.train import documented
from nestling.train.settings import split_batch

HELD_BACK = 4096  # tokens on which short distillations are compared, at most
SAMPLE_TOKENS = 40
PROMPTS = (
    "The most important thing about a library is",
    'def read_config(path):\n    """Read the configuration',
    "The history of the city began",
)


@documented
@dataclass(kw_only=True)
class ChildSettings(ShapeSettings):
    """Settings of a verb that makes children of a model.

    Args:
        metric: Importance of width units: contribution, relative or activation; what suits each axis unless given.
        layers: Importance of layers: block_influence, perplexity, kl or output_error.
        merge: What becomes of pruned query heads: none, paper or average.
        repair: Refit the matrices that read pruned units by least squares on the calibration text.
        distill: Settings of the distillation.
        evaluate_on: Further data sets to report perplexity on, besides the validation part of the training data.
        evaluation_tokens: Tokens per data set for perplexity.
        pairs: File or folder of minimal pairs (BLiMP's JSONL format) to evaluate on.
        overwrite: Start anew even if the run folder holds a run.
    """

    metric: str | None = None
    layers: str = "block_influence"
    merge: str = "none"
    repair: bool = True
    distill: DistillSettings = field(default_factory=DistillSettings)
    evaluate_on: str | list[str] = ""
    evaluation_tokens: int = 8192
    pairs: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("evaluation_tokens", self.evaluation_tokens, 1)
        check_metrics(self.metric, self.layers)
        check_merge(self.merge)


class Parent:
    """The model that a job starts from and that teaches all of its children, with its texts and figures.

    run: the folder in which they are kept; set before anything but `model` and `tokenizer` is asked for. cache: folder
    for the parent's likeliest tokens, if its children are to share them.
    tokens: of calibration text.
    """

    run: Run
    cache: Path | None = None

    def __init__(self, settings: Any, tokens: int):
        self.settings, self.tokens = settings, tokens
        at_least("calibration tokens", tokens, 1)
        self.source = Source.open(settings)
        self.model, self.tokenizer = self.source.model, self.source.tokenizer
        self._check_texts()

    @cached_property
    def text(self) -> Tensor:
        """Calibration text `[rows, context]`."""
        return self.run.stage(
            "calibration.safetensors",
            lambda: self.source.calibration(self.settings, self.tokens),
            lambda rows, path: save_file({"input_ids": rows.contiguous()}, path),
            lambda path: load_file(path)["input_ids"],
        )

    def _check_texts(self) -> None:
        """Find out before long work what cannot be read, or holds too little."""
        settings = self.settings
        how = settings.distill.sized()
        split_batch(how, how.context, self.model.device)
        for context in {settings.context, how.context}:
            batches(settings.data, self.tokenizer, context=context, tokens=context)
        evaluated = [(spec, "all") for spec in listed(getattr(settings, "evaluate_on", ""))]
        for spec, split in [(settings.data, "validation"), *evaluated]:
            documents(spec, split, tokenizer=self.tokenizer)
        if getattr(settings, "pairs", None):
            read_pairs(settings.pairs)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """What all children learn from: the parent, or a copy of it that is corrected once for all of them."""
        how = self.settings.distill
        if how.correction != "first":
            return self.model
        console.print("    the teacher, corrected on the text")
        return corrected(self.model, self.settings.data, self.tokenizer, how, self.run.folder)

    def taught(self) -> None:
        """Say that the last child is distilled: a corrected teacher goes, unless it is to be kept."""
        how = self.settings.distill
        if how.correction == "first":
            processes.first(lambda: leave(self.run.folder, how.keep_teacher))

    def load(self, run: Run, name: str) -> PreTrainedModel:
        """A model that is kept in a run folder, where and how the parent is."""
        return hub.load(run.path(name), dtype=self.model.dtype, device=self.model.device)[0]

    def trial(self) -> Trial | None:
        """Short distillation for a search, and the loss on text that was held back, if the settings ask for it."""
        settings = self.settings
        if not settings.trial_tokens:
            return None
        held_back = batches(
            settings.data,
            self.tokenizer,
            context=settings.context,
            tokens=min(settings.trial_tokens, HELD_BACK),
            split="validation",
        )

        def train(child: PreTrainedModel, tokens: int) -> PreTrainedModel:
            how = replace(settings.distill, tokens=tokens, steps=None, correction="none", evaluate_every=0)
            return distill(child, self.model, settings.data, self.tokenizer, how)

        return Trial(train, token_loss(held_back), settings.trial_tokens)

    def evaluation(self) -> dict[str, Any]:
        return self.run.values("evaluation-parent.json", lambda: self.scores("parent", self.model))

    @torch.no_grad()
    def scores(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity of a model on every text, and its accuracy on minimal pairs if there are any."""
        settings, found = self.settings, {}
        for spec in dict.fromkeys([settings.data, *listed(settings.evaluate_on)]):
            split = "validation" if spec == settings.data else "all"
            what, window = f"perplexity, {name}", {"context": settings.context, "split": split}
            found[spec] = measured(what, model, self.tokenizer, spec, settings.evaluation_tokens, **window)
        if settings.pairs:
            pairs = evaluate.minimal_pairs(model, self.tokenizer, settings.pairs)
            found["minimal pairs"] = {"accuracy": pairs.accuracy, "pairs": pairs.pairs}
        return found

    def samples(self, child: PreTrainedModel) -> list[dict[str, str]]:
        """What parent and child write after a few prompts."""
        models = {"parent": self.model, "child": child}
        return [
            {"prompt": prompt, **{who: self._continue(model, prompt) for who, model in models.items()}}
            for prompt in PROMPTS
        ]

    @torch.no_grad()
    def _continue(self, model: PreTrainedModel, prompt: str) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        output = cast(Any, model).generate(
            **inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False, pad_token_id=self.tokenizer.eos_token_id
        )
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


class Origin:
    """A model that children are cut from: its ranking, kept in a run folder, and what a repair needs, made once.

    given: a ranking that was made before.
    """

    def __init__(self, parent: Parent, model: PreTrainedModel, run: Run, given: Ranking | None = None):
        self.parent, self.model, self.run, self.given = parent, model, run, given
        if given is not None:
            check_ranking(Anatomy.of(model), given)

    @cached_property
    def ranking(self) -> Ranking:
        if self.given is not None:
            return self.given
        return self.run.stage("ranking.safetensors", self._rank, lambda value, path: value.save(path), Ranking.load)

    @cached_property
    def repair(self) -> Repair | None:
        return Repair(self.model, in_batches(self.parent.text)) if self.parent.settings.repair else None

    def search(self, target: Target) -> list[Candidate]:
        """Candidates for a target, best first; what is measured serves every target and is kept."""
        parent, losses = self.parent, KeptFigures(self.run.path("losses.json"))
        ground = Ground(self.model, parent.settings, self.ranking, parent.text, self.repair, losses, parent.trial())
        return ground.candidates(target)

    def prune(self, shape: Shape) -> PreTrainedModel:
        merge = getattr(self.parent.settings, "merge", "none")
        return prune(self.model, self.ranking, shape, merge, self.repair)

    def _rank(self) -> Ranking:
        settings, text = self.parent.settings, self.parent.text
        how = {name: getattr(settings, name) for name in ("metric", "layers") if hasattr(settings, name)}
        with bar("ranking, tokens", text.numel()) as advance:
            return rank(self.model, in_batches(text), progress=advance, **how)


class Child:
    """One child in the making: every stage keeps its result in `run` and gives it back if it is there."""

    def __init__(self, parent: Parent, origin: Origin, run: Run, name: str):
        self.parent, self.origin, self.run, self.name = parent, origin, run, name

    def search(self, target: Target) -> Shape:
        """The best shape for a target; its candidates are kept."""
        self.candidates = self.run.values(
            "candidates.json", lambda: [candidate.to_dict() for candidate in self.origin.search(target)]
        )
        self.shape = Shape(**self.candidates[0]["shape"])
        if word := kernel_word(Anatomy.of(self.origin.model), self.shape):
            console.print(f"    {word}")
        return self.shape

    def prune(self) -> None:
        self.run.model("pruned", lambda: self.origin.prune(self.shape), self.parent.tokenizer)

    def distill(self) -> None:
        self.run.model("model", self._distilled, self.parent.tokenizer)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The finished child."""
        return self.parent.load(self.run, "model")

    def evaluate(self) -> dict[str, Any]:
        """Perplexities of all three, minimal pairs, speed side by side, and samples; what is kept is not done again.

        Of several processes the first does it, while the others wait.
        """
        found: dict[str, Any] = processes.first(self._evaluate)
        return found

    def _evaluate(self) -> dict[str, Any]:
        parent, run = self.parent, self.run
        models: dict[str, Callable[[], PreTrainedModel]] = {
            "pruned": partial(parent.load, run, "pruned"),
            "child": lambda: self.model,
        }
        scores = {"parent": parent.evaluation()} | {
            name: run.values(f"evaluation-{name}.json", partial(self._scores, name, model))
            for name, model in models.items()
        }
        pair = {"parent": parent.model, "child": self.model}
        speed = run.values("speed.json", lambda: {k: asdict(v) for k, v in evaluate.speed(pair).items()})
        samples = run.values("samples.json", lambda: parent.samples(self.model))
        return {"scores": scores, "speed": speed, "samples": samples}

    def _scores(self, name: str, model: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        return self.parent.scores(name, model())

    def _distilled(self) -> PreTrainedModel:
        parent, how = self.parent, self.parent.settings.distill
        return distill(
            parent.load(self.run, "pruned"),
            parent.teacher,
            parent.settings.data,
            parent.tokenizer,
            replace(how, correction="none") if how.correction == "first" else how,
            run_dir=self.run.folder,
            cache=parent.cache,
        )
