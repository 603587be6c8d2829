"""The whole job: rank, search, prune, distill, evaluate, report, in one resumable run folder.

Each stage keeps its result in the folder (ranking.safetensors, candidates.json, pruned/, model/, evaluation-*.json,
speed.json, samples.json), so an interrupted job continues where it was. Paper: Minitron, arXiv 2407.14679, figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from nestling import data, evaluate, hub
from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.distill import DistillSettings, distill
from nestling.errors import DataError
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import Stages, bar, console
from nestling.recipes.run import Run
from nestling.recipes.source import listed
from nestling.recipes.summary import summarize
from nestling.report import comparison, write_model_card, write_report
from nestling.search import Budget, Candidate, candidates, describe, pick
from nestling.shape import Shape
from nestling.surgery import prune

PROMPTS = (
    "The most important thing about a library is",
    'def read_config(path):\n    """Read the configuration',
    "The history of the city began",
)


@dataclass
class CompressSettings:
    """Settings of `compress`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Target: 0.5x, 100M, or named limits such as params=4B,kv_bytes=1G.
        data: Training text: hub dataset, local file or folder, or builtin:stdlib.
        out: Run folder; everything the job makes goes there.
        shape: Take this shape (FIELD=NUMBER,... or a JSON file) instead of searching for one.
        axes: Config fields that may be cut, with commas between; all of them unless given.
        metric: Importance of width units: contribution or activation.
        layers: Importance of layers: block_influence, perplexity, kl or output_error.
        merge: What becomes of pruned query heads: none, paper or average.
        calibration_tokens: Tokens to rank and to score candidates with.
        finalists: Candidate shapes that are cut and scored.
        distill: Settings of the distillation.
        evaluate_on: Further data sets to report perplexity on, besides the validation part of the training data.
        evaluation_tokens: Tokens per data set for perplexity.
        pairs: File or folder of minimal pairs (BLiMP's JSONL format) to evaluate on.
        context: Tokens per row of calibration, distillation and evaluation text.
        cost_context: Tokens per sequence at which KV cache and FLOPs are counted.
        seed: The one seed of every random choice.
        dtype: Of the weights: auto, float32, bfloat16 or float16.
        device: Where to compute; the best there is unless given.
        trust_remote_code: Let the checkpoint run code of its own.
        overwrite: Start anew even if the run folder holds a run.
    """

    model: str
    to: str = "0.75x"
    data: str = "builtin:stdlib"
    out: str = "runs/compress"
    shape: str | None = None
    axes: str | list[str] = ""
    metric: str = "contribution"
    layers: str = "block_influence"
    merge: str = "none"
    calibration_tokens: int = 8192
    finalists: int = 4
    distill: DistillSettings = field(default_factory=DistillSettings)
    evaluate_on: str | list[str] = ""
    evaluation_tokens: int = 8192
    pairs: str | None = None
    context: int = 256
    cost_context: int = 4096
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False


def compress(settings: CompressSettings) -> dict[str, Any]:
    """Run the job, or what is left of it; returns the summary that the report shows.

    Raises a `NestlingError` for anything wrong with the settings before any long work starts.
    """
    budget = Budget.parse(settings.to)
    set_seed(settings.seed)
    job = _Job(settings)
    shapes = job.feasible(budget)
    run = job.run = Run("compress", settings, settings.out, settings.overwrite)
    stages = Stages(6)
    with stages("rank every axis on calibration text"):
        ranking = run.stage("ranking.safetensors", job.rank, lambda value, path: value.save(path), Ranking.load)
    with stages(f"search a shape for {budget}" if len(shapes) > 1 else "take the given shape"):
        tried = run.values("candidates.json", lambda: [c.to_dict() for c in job.search(ranking, shapes)])
        shape = Shape(**tried[0]["shape"])
        console.print(f"    {describe(shape)}")
    with stages("prune"):
        job.once("pruned", lambda: prune(job.parent, ranking, shape, settings.merge))
    with stages("distill from the parent"):
        job.once("model", lambda: job.distill(job.load("pruned")))
    with stages("evaluate parent and child"):
        results = job.evaluate()
    with stages("write the report"):
        summary = summarize(job.parent, job.load("model"), ranking, shape, tried, settings, results)
        run.values("summary.json", lambda: summary)
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
        self.parent, tokenizer = hub.load(
            settings.model,
            dtype=settings.dtype,
            device=settings.device,
            trust_remote_code=settings.trust_remote_code,
        )
        if tokenizer is None:
            raise DataError(f"'{settings.model}' has no tokenizer, which text data needs: add its tokenizer files")
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.parent.eval().requires_grad_(False)
        data.check_tokenizer(tokenizer, self.parent.config.vocab_size)
        self.calibration = data.batches(
            settings.data,
            tokenizer,
            context=settings.context,
            tokens=settings.calibration_tokens,
            batch_size=8,
            seed=settings.seed,
        )

    def feasible(self, budget: Budget) -> list[tuple[Shape, Any]]:
        """Shapes to choose from: the one that was given, or all that keep the budget."""
        if self.settings.shape:
            shape = Shape.parse(self.settings.shape)
            return [(shape, cost(self.parent, shape, self.settings.cost_context))]
        anatomy = Anatomy.of(self.parent)
        return candidates(anatomy, budget, self.settings.cost_context, tuple(listed(self.settings.axes)))

    def rank(self) -> Ranking:
        tokens = sum(batch["input_ids"].numel() for batch in self.calibration)
        with bar("tokens", tokens) as advance:
            return rank(
                self.parent, self.calibration, self.settings.metric, layers=self.settings.layers, progress=advance
            )

    def search(self, ranking: Ranking, shapes: list[tuple[Shape, Any]]) -> list[Candidate]:
        if len(shapes) == 1:
            return [Candidate(*shapes[0], expected=0.0)]
        few = self.calibration[: max(1, len(self.calibration) // 4)]
        return pick(
            self.parent,
            ranking,
            shapes,
            few,
            self.settings.finalists,
            progress=lambda text: console.print(f"    {text}"),
        )

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
    def evaluate(self) -> dict[str, Any]:
        """Perplexities of all three, minimal pairs, speed side by side, and samples."""
        child = self.load("model")
        models = {"parent": self.parent, "pruned": self.load("pruned"), "child": child}
        scores = {
            name: self.run.values(f"evaluation-{name}.json", partial(self._scores, model))
            for name, model in models.items()
        }
        pair = {"parent": self.parent, "child": child}
        speed = self.run.values("speed.json", lambda: {k: vars(v) for k, v in evaluate.speed(pair).items()})
        samples = self.run.values("samples.json", lambda: [self._sample(prompt, child) for prompt in PROMPTS])
        return {"scores": scores, "speed": speed, "samples": samples}

    def _scores(self, model: PreTrainedModel) -> dict[str, Any]:
        settings = self.settings
        found = {}
        for spec in dict.fromkeys([settings.data, *listed(settings.evaluate_on)]):
            split = "validation" if spec == settings.data else "all"
            result = evaluate.perplexity(
                model,
                self.tokenizer,
                spec,
                context=settings.context,
                tokens=settings.evaluation_tokens,
                split=split,
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
