"""The whole job: rank, search, prune, distill, evaluate, report, in one resumable run folder.

Each stage keeps its result in the folder (calibration.safetensors, ranking.safetensors, candidates.json, pruned/,
model/, evaluation-*.json, speed.json, samples.json), so an interrupted job continues where it was. Paper: Minitron,
arXiv 2407.14679, figure 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from nestling import evaluate, hub
from nestling.data import batches
from nestling.distill import DistillSettings, distill
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import Stages, bar, console
from nestling.recipes.run import Run
from nestling.recipes.settings import ShapeSettings, listed
from nestling.recipes.shapes import Priced, feasible, tried
from nestling.recipes.source import Source, in_batches
from nestling.recipes.summary import summarize
from nestling.report import comparison, write_model_card, write_report
from nestling.search import Budget, Candidate, describe
from nestling.shape import Shape
from nestling.surgery import prune
from nestling.surgery.repair import Repair
from nestling.train import documented

PROMPTS = (
    "The most important thing about a library is",
    'def read_config(path):\n    """Read the configuration',
    "The history of the city began",
)


@documented
@dataclass
class CompressSettings(ShapeSettings):
    """Settings of `compress`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits such as params=4B,kv_bytes=1G.
        out: Run folder; everything the job makes goes there.
        shape: Take this shape (FIELD=NUMBER,... or a JSON file) instead of searching for one.
        metric: Importance of width units: contribution, relative or activation; what suits each axis unless given.
        layers: Importance of layers: block_influence, perplexity, kl or output_error.
        merge: What becomes of pruned query heads: none, paper or average.
        repair: Refit the matrices that read pruned units by least squares on the calibration text.
        calibration_tokens: Tokens to rank and to score candidates with.
        distill: Settings of the distillation.
        evaluate_on: Further data sets to report perplexity on, besides the validation part of the training data.
        evaluation_tokens: Tokens per data set for perplexity.
        pairs: File or folder of minimal pairs (BLiMP's JSONL format) to evaluate on.
        overwrite: Start anew even if the run folder holds a run.
    """

    model: str
    to: str = "0.75x"
    out: str = "runs/compress"
    shape: str | None = None
    metric: str | None = None
    layers: str = "block_influence"
    merge: str = "none"
    repair: bool = True
    calibration_tokens: int = 8192
    distill: DistillSettings = field(default_factory=DistillSettings)
    evaluate_on: str | list[str] = ""
    evaluation_tokens: int = 8192
    pairs: str | None = None
    overwrite: bool = False


def compress(settings: CompressSettings) -> dict[str, Any]:
    """Run the job, or what is left of it; returns the summary that the report shows.

    Raises a `NestlingError` for anything wrong with the settings before any long work starts.
    """
    budget = Budget.parse(settings.to)
    job = _Job(settings)
    shapes = feasible(job.parent, settings, settings.to, settings.shape)
    run = job.run = Run("compress", settings, settings.out, settings.overwrite)
    stages = Stages(6)
    with stages("rank every axis on calibration text"):
        ranking = run.stage("ranking.safetensors", job.rank, lambda value, path: value.save(path), Ranking.load)
    with stages(f"search a shape for {budget}" if len(shapes) > 1 else "take the given shape"):
        scored = run.values("candidates.json", lambda: [c.to_dict() for c in job.search(ranking, shapes)])
        shape = Shape(**scored[0]["shape"])
        console.print(f"    {describe(shape)}")
    with stages("prune"):
        job.once("pruned", lambda: job.prune(ranking, shape))
    with stages("distill from the parent"):
        job.once("model", lambda: job.distill(job.load("pruned")))
    with stages("evaluate parent and child"):
        child = job.load("model")
        results = job.evaluate(child)
    with stages("write the report"):
        summary = run.values(
            "summary.json", lambda: summarize(job.parent, child, ranking, shape, scored, settings, results)
        )
        write_model_card(run.folder)
        report = write_report(run.folder)
    console.print(comparison(summary))
    console.print(f"report: {report}\nmodel:  {run.path('model')}")
    return summary


class _Job:
    """The models and data of one job, loaded once."""

    run: Run

    def __init__(self, settings: CompressSettings):
        self.settings = settings
        source = Source.open(settings)
        self.parent, self.tokenizer = source.model, source.tokenizer
        self.source = source
        # Data that cannot be read is found out before long work.
        batches(settings.data, self.tokenizer, context=settings.context, tokens=settings.context)

    @cached_property
    def text(self) -> Tensor:
        """Calibration text `[rows, context]`."""
        return self.run.stage(
            "calibration.safetensors",
            lambda: self.source.calibration(self.settings, self.settings.calibration_tokens),
            lambda rows, path: save_file({"input_ids": rows.contiguous()}, path),
            lambda path: load_file(path)["input_ids"],
        )

    @cached_property
    def repair(self) -> Repair | None:
        return Repair(self.parent, in_batches(self.text)) if self.settings.repair else None

    def rank(self) -> Ranking:
        rows = in_batches(self.text)
        with bar("ranking, tokens", self.text.numel()) as advance:
            return rank(self.parent, rows, self.settings.metric, layers=self.settings.layers, progress=advance)

    def search(self, ranking: Ranking, shapes: Priced) -> list[Candidate]:
        return tried(self.parent, self.settings, shapes, ranking, self.text, self.repair)

    def prune(self, ranking: Ranking, shape: Shape) -> PreTrainedModel:
        return prune(self.parent, ranking, shape, self.settings.merge, self.repair)

    def once(self, name: str, make: Any) -> None:
        """Make a model and keep it under `name`, unless it is there."""
        if not self.run.path(name).exists():
            hub.save(make(), self.run.path(name), self.tokenizer)

    def load(self, name: str) -> PreTrainedModel:
        return hub.load(self.run.path(name), dtype=self.parent.dtype, device=self.parent.device)[0]

    def distill(self, child: PreTrainedModel) -> PreTrainedModel:
        return distill(
            child, self.parent, self.settings.data, self.tokenizer, self.settings.distill, run_dir=self.run.folder
        )

    @torch.no_grad()
    def evaluate(self, child: PreTrainedModel) -> dict[str, Any]:
        """Perplexities of all three, minimal pairs, speed side by side, and samples; what is kept is not done again."""
        models: dict[str, Callable[[], PreTrainedModel]] = {
            "parent": lambda: self.parent,
            "pruned": partial(self.load, "pruned"),
            "child": lambda: child,
        }
        scores = {
            name: self.run.values(f"evaluation-{name}.json", partial(self._scores, name, model))
            for name, model in models.items()
        }
        pair = {"parent": self.parent, "child": child}
        speed = self.run.values("speed.json", lambda: {k: vars(v) for k, v in evaluate.speed(pair).items()})
        samples = self.run.values("samples.json", lambda: [self._sample(prompt, child) for prompt in PROMPTS])
        return {"scores": scores, "speed": speed, "samples": samples}

    def _scores(self, name: str, load: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        settings, model = self.settings, load()
        found = {}
        for spec in dict.fromkeys([settings.data, *listed(settings.evaluate_on)]):
            split = "validation" if spec == settings.data else "all"
            with bar(f"perplexity of the {name}, tokens", settings.evaluation_tokens) as advance:
                result = evaluate.perplexity(
                    model,
                    self.tokenizer,
                    spec,
                    context=settings.context,
                    tokens=settings.evaluation_tokens,
                    split=split,
                    progress=advance,
                )
            found[spec] = {
                "perplexity": result.value,
                "loss": result.loss,
                "tokens": result.tokens,
                "context": result.context,
                "stride": result.stride,
            }
        if settings.pairs:
            pairs = evaluate.minimal_pairs(model, self.tokenizer, settings.pairs)
            found["minimal pairs"] = {"accuracy": pairs.accuracy, "pairs": pairs.pairs}
        return found

    def _sample(self, prompt: str, child: PreTrainedModel) -> dict[str, str]:
        return {"prompt": prompt, "parent": self._continue(self.parent, prompt), "child": self._continue(child, prompt)}

    def _continue(self, model: PreTrainedModel, prompt: str) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt").to(model.device)
        output = cast(Any, model).generate(
            **inputs, max_new_tokens=40, do_sample=False, pad_token_id=self.tokenizer.eos_token_id
        )
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
