"""`nestling moe ...`: mixtures of experts made from dense models, made finer, dense again, pruned, and trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nestling import hub, moe, processes
from nestling.anatomy import Anatomy
from nestling.cost import cost
from nestling.data import packed
from nestling.errors import DataError, NestlingError, ShapeError
from nestling.hub.load import tokenizer_beside
from nestling.pretrain import architecture_config, build, names_checkpoint
from nestling.ranking import Ranking, rank
from nestling.recipes.progress import bar, console
from nestling.recipes.run import Run, check_folder
from nestling.recipes.scratch import (
    ScratchSettings,
    fields,
    given_tokenizer,
    trained_model,
    trained_tokenizer,
    validated,
)
from nestling.recipes.settings import FORMER_TOKENS, CalibrationSettings, ModelSettings, at_least
from nestling.recipes.source import Source, in_batches, load, measured
from nestling.recipes.summary import origin
from nestling.report import comparison, write_report
from nestling.report.human import count, figure
from nestling.shape import fit
from nestling.surgery import prune
from nestling.train import documented

METRICS = ("contribution", "output_error", "gate", "frequency", "reap")
FRESH = ("num_experts", "num_experts_per_tok", "shared", "normalize", "mode", "router_std")  # of mixtures made here


@documented
@dataclass
class UpcycleSettings(ModelSettings):
    """Settings of `moe upcycle`.

    Args:
        model: Dense model to make a mixture of; or a mixture, whose experts are then split by the granularity.
        num_experts: Experts, each as wide as the FFN; times the granularity in the result.
        num_experts_per_tok: Experts that a token uses; times the granularity in the result.
        granularity: Parts that each expert is cut into: 1 is a standard mixture, 8 a fine-grained one.
        shared: Parts of the FFN, of granularity, that make one expert for all tokens (granite, qwen2).
        mode: exact keeps the logits; paper scales all three matrices and takes weights from the softmax over all.
        router_std: Standard deviation of the fresh router's weights.
        out: Folder to write the model to.
        seed: Of the fresh router.
        overwrite: Replace the output folder.
    """

    model: str
    num_experts: int = 8
    num_experts_per_tok: int = 2
    granularity: int = 1
    shared: int = 0
    mode: str = "exact"
    router_std: float = 0.02
    out: str = "upcycled"
    seed: int = 0
    overwrite: bool = False


@documented
@dataclass
class ExpertSettings(CalibrationSettings):
    """Settings of `moe prune`.

    Args:
        model: Model with routed experts.
        keep: Experts to keep in each layer, as a number or a part (0.5x).
        metric: What experts are ranked by: contribution (in one pass), output_error (each left out in turn), gate,
            frequency or reap.
        merge: Average the experts that go into the kept ones most like them, instead of dropping them.
        dense: Put the kept experts side by side as one FFN, to be distilled; keep is then the number of them, that of a
            token's experts unless given.
        evaluation_tokens: Tokens of the validation part on which model and result are measured; 0 for none.
        out: Folder to write the model to.
        overwrite: Replace the output folder.
    """

    FORMER: ClassVar[dict[str, str]] = FORMER_TOKENS

    model: str
    keep: str | None = None
    metric: str = "contribution"
    merge: bool = False
    dense: bool = False
    evaluation_tokens: int = 8192
    out: str = "pruned"
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("evaluation_tokens", self.evaluation_tokens, 0)
        if self.metric not in METRICS:
            raise NestlingError(f"metric '{self.metric}' does not rank experts: choose from {', '.join(METRICS)}")
        if self.keep is None and not self.dense:
            raise NestlingError("say how many experts to keep in each layer, as in --keep 0.5x or --keep 32")
        if self.merge and self.dense:
            raise NestlingError("experts are merged or put side by side as one FFN: give --merge or --dense, not both")


@documented
@dataclass
class MixtureVerb(ScratchSettings):
    """Settings of `moe train`.

    Args:
        architecture: Mixture to train: a checkpoint (whose weights are kept) or a dense preset or YAML file with
            model_type and config fields, which num_experts and the two below make a fresh mixture of.
        out: Run folder; metrics, checkpoints and the trained model go there.
        num_experts: Experts of a fresh mixture, each as wide as the FFN; times the granularity.
        num_experts_per_tok: Of them a token uses so many; times the granularity.
        granularity: Parts that each expert is cut into; total and active parameters stay. Down projections start that
            many times larger, so that what a token's experts write together is as large at the start as without.
        shared: Parts of the FFN, of granularity, that make one expert for all tokens (granite, qwen2).
        normalize: Weights of the chosen experts add up to 1 (softmax after top-k); otherwise they come from the softmax
            over all.
        train: Settings of the training.
    """

    architecture: str
    out: str = "runs/moe"
    num_experts: int = 8
    num_experts_per_tok: int = 2
    granularity: int = 1
    shared: int = 0
    normalize: bool = True
    train: moe.MixtureSettings = field(default_factory=moe.MixtureSettings)


def upcycle_model(settings: UpcycleSettings) -> dict[str, Any]:
    """Make the mixture, say how far its logits are from the model's, and save it."""
    check_folder(settings)
    model, tokenizer = load(settings, settings.model)
    if Anatomy.of(model).routed_layers():
        _check_idle(settings, settings.model, "only their granularity can be raised, as in --granularity 2")
        if settings.granularity == 1:
            raise NestlingError(
                f"'{settings.model}' is a mixture already: split its experts with --granularity 2 or more"
            )
        made = moe.split(model, settings.granularity)
    else:
        numbers = (settings.num_experts, settings.num_experts_per_tok, settings.granularity)
        made = moe.upcycle(model, *numbers, settings.mode, settings.router_std, settings.seed, settings.shared)
    difference = _difference(model, made)
    console.print(f"largest difference of a logit from the model's: {difference:.2g}")
    return _saved(made, tokenizer, settings.out, settings.overwrite, {"logit_difference": difference})


def prune_experts(settings: ExpertSettings) -> dict[str, Any]:
    """Rank the experts, drop or merge what is below, save the rest, and say what that cost."""
    check_folder(settings)
    source = Source.open(settings)
    anatomy = Anatomy.of(source.model)
    next(moe.routed_modules(source.model))  # refuses a model without experts
    axis = next(axis for axis in anatomy.axes.values() if axis.active)
    keep = _kept(settings.keep, anatomy.value(axis, anatomy.routed_layers()[0])) if settings.keep else None
    _check_cut(anatomy, axis.field, keep, settings)
    before = _evaluation("parent", source.model, source, settings)
    batches = in_batches(source.calibration(settings, settings.calibration_tokens))
    with bar("ranking, tokens", settings.calibration_tokens) as advance:
        ranking = rank(source.model, batches, metric={axis.field: settings.metric}, progress=advance)
    fewest = min(int(load.min()) for load in moe.loads(source.model, batches))
    console.print(f"the expert with the fewest calibration tokens saw {fewest}")
    made = _cut(source.model, ranking, axis.field, keep, batches, settings)
    total, kept = getattr(source.model.config, axis.field), getattr(made.config, axis.field, None)
    how = "the others merged into them" if settings.merge else "the others dropped"
    console.print(
        f"one FFN of {made.config.intermediate_size} neurons in each layer"
        if kept is None
        else f"{kept} of {total} experts stay in each layer, {how}"
    )
    after = _evaluation("pruned", made, source, settings) if before else {}
    parent = {"cost": cost(anatomy).to_dict(), "evaluation": before}
    console.print(comparison({"parent": parent, "child": {"cost": cost(made).to_dict(), "pruned": after}}))
    more = {"fewest_tokens": fewest, "evaluation": {"parent": before, "pruned": after}}
    return _saved(made, source.tokenizer, settings.out, settings.overwrite, more)


def train_mixture(settings: MixtureVerb) -> dict[str, Any]:
    """Train the mixture, or go on with it; returns where it is, its held-out loss and the load of its experts."""
    checkpoint = names_checkpoint(settings.architecture)
    config = None if checkpoint else _mixture(settings)
    if checkpoint:
        _check_idle(
            settings, settings.architecture, "change them with nestling moe upcycle or prune", "granularity", "set"
        )
        moe.check_routed(Anatomy.of(hub.config(settings.architecture, trust_remote_code=settings.trust_remote_code)))
    given = given_tokenizer(settings)
    run = Run("moe train", settings, settings.out, settings.overwrite)
    tokenizer = given or trained_tokenizer(settings, run)
    if config is not None:
        tokenizer = tokenizer_beside(tokenizer, config.model_type)

    def trained() -> PreTrainedModel:
        if config is None:
            model = hub.load(settings.architecture, dtype="float32", device=settings.device)[0]
        else:
            model = build(config, tokenizer, settings.train.seed, settings.device)
            numbers = (settings.num_experts, settings.num_experts_per_tok, settings.granularity)
            moe.scale_experts(model, moe.fresh_scale(*numbers, settings.normalize, settings.shared))
        console.print(_described(model))
        return moe.train(model, settings.data, tokenizer, settings.train, run.folder)

    target = run.model("model", trained, tokenizer)
    summary = run.values("summary.json", lambda: _summary(settings, target, tokenizer))
    report = processes.first(lambda: str(write_report(run.folder)))
    load = summary["load"]
    console.print(f"validation loss {figure(summary['loss'])}; busiest expert {figure(load['max_load'])}x the mean")
    console.print(f"report: {report}\nmodel: {target}")
    return {"model": str(target), **summary}


def _mixture(settings: MixtureVerb) -> PreTrainedConfig:
    """The config to train with fresh weights: as it is if it has experts, else made a mixture."""
    config = architecture_config(settings.architecture, fields(settings.set), settings.trust_remote_code)
    if Anatomy.of(config).routed_layers():
        _check_idle(
            settings, settings.architecture, "change its fields, as in --set num_experts_per_tok=4", "granularity"
        )
        return config
    numbers = (settings.num_experts, settings.num_experts_per_tok, settings.granularity)
    return moe.mixture_config(config, *numbers, post=settings.normalize, shared=settings.shared)


def _check_idle(settings: Any, what: str, remedy: str, *more: str) -> None:
    """Refuse settings of fresh mixtures that a model with experts of its own would not heed."""
    names = [name for name in (*FRESH, *more) if getattr(settings, name, None) != getattr(type(settings), name, None)]
    if names:
        raise NestlingError(f"'{what}' has experts of its own, for which {', '.join(names)} would do nothing: {remedy}")


def _described(model: PreTrainedModel) -> str:
    """What a mixture is, in two short lines."""
    anatomy = Anatomy.of(model)
    if not anatomy.routed_layers():
        return f"{model.config.model_type}, {count(model.num_parameters())} parameters"
    experts, chosen, width = moe.sizes_of(anatomy)
    price = cost(anatomy)
    return (
        f"{model.config.model_type}, {experts} experts of {width} neurons, {chosen} of a token\n"
        f"{count(price.params)} parameters, {count(price.active_params)} active (both with embeddings)"
    )


def _summary(settings: MixtureVerb, folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rows = packed(settings.data, tokenizer, context=settings.train.context, tokens=8192, seed=settings.train.seed)
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in rows])
    model = trained_model(settings, folder)
    loads = moe.loads(model, in_batches(ids))
    anatomy = Anatomy.of(model)
    experts, chosen, _ = moe.sizes_of(anatomy)
    load = {
        **moe.health(loads),
        "experts": experts,
        "per_token": chosen,
        "layers": anatomy.routed_layers(),
        "per_layer": [[int(slots) for slots in layer] for layer in loads],
    }
    sizes = f"{experts} experts, {chosen} of a token"
    measured = validated(settings, model, tokenizer)
    return {
        **origin(f"{model.config.model_type}, {sizes}", settings.train.seed, model),
        **measured,
        "evaluation": {settings.data: {"perplexity": measured["validation"]["value"], "loss": measured["loss"]}},
        "data": {"train": settings.data, "validation": settings.data},
        "load": load,
    }


def _evaluation(name: str, model: PreTrainedModel, source: Source, settings: ExpertSettings) -> dict[str, Any]:
    """Perplexity on the validation part of the data, by its name; a word instead where there is no such part."""
    if not settings.evaluation_tokens:
        return {}
    where = (settings.data, settings.evaluation_tokens)
    try:
        found = processes.first(
            lambda: measured(f"perplexity, {name}", model, source.tokenizer, *where, context=settings.context)
        )
    except DataError as error:
        console.print(f"what this costs is not measured: {error}")
        return {}
    return {settings.data: found}


def _cut(
    model: PreTrainedModel,
    ranking: Ranking,
    name: str,
    keep: int | None,
    batches: list[dict[str, Tensor]],
    settings: ExpertSettings,
) -> PreTrainedModel:
    if settings.dense:
        return moe.to_dense(model, ranking, keep, batches)
    assert keep is not None
    if settings.merge:
        return moe.merge(model, ranking, keep, moe.loads(model, batches))
    return prune(model, ranking, {name: keep})


def _check_cut(anatomy: Anatomy, name: str, keep: int | None, settings: ExpertSettings) -> None:
    """Refuse what cannot be before anything is ranked."""
    if settings.dense:
        moe.check_dense(anatomy, keep)
    else:
        fit(anatomy, {name: keep})


def _kept(text: str, experts: int) -> int:
    part = text.endswith("x")
    try:
        kept = round(float(text[:-1]) * experts) if part else int(text)
    except ValueError:
        kept = 0
    if not 1 <= kept <= experts:
        raise ShapeError(f"--keep {text} of {experts} experts cannot be: give a number up to that, or a part as 0.5x")
    return kept


@torch.no_grad()
def _difference(model: PreTrainedModel, made: PreTrainedModel) -> float:
    """Largest difference of a logit on random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    return (model(input_ids=ids).logits - made(input_ids=ids).logits).abs().max().item()


def _saved(
    made: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: str, overwrite: bool, more: dict[str, Any]
) -> dict[str, Any]:
    processes.first(lambda: str(hub.save(made, out, tokenizer, overwrite=overwrite)))
    price = cost(made)
    console.print(f"model: {out} ({count(price.params)} parameters, {count(price.active_params)} active)")
    return {"model": out, "cost": price.to_dict(), **more}
