"""`nestling dmc retrofit`, `show` and `eval`: a model that learns to merge, what it merges, and what that costs.

A retrofit keeps its stages in one run folder (checkpoints, model/, measured.json, report.html), so an interrupted job
goes on where it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from nestling import data, dmc
from nestling.anatomy import Anatomy, cache_name
from nestling.dmc import RetrofitSettings
from nestling.dmc.convert import check
from nestling.dmc.show import Merges, merges
from nestling.errors import NestlingError
from nestling.recipes.progress import Stages, bar, console
from nestling.recipes.run import Run
from nestling.recipes.settings import ModelSettings
from nestling.recipes.source import Source, measured
from nestling.report.slots import slots_page
from nestling.runs import write_atomically
from nestling.train import documented, split_batch

EXCERPT = 64  # tokens that the report shows cut into slots
WELL_MET = 0.9  # of the ratio that was asked for: less is told


@documented
@dataclass
class RetrofitVerb(ModelSettings):
    """Settings of `dmc retrofit`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        ratio: Tokens per slot that the cache shall reach; goes before train.ratio.
        method: dmc, where tokens merge, or dms, where they are dropped after a while; goes before train.method.
        data: Training text: hub dataset, local file or folder, or builtin:stdlib.
        out: Run folder; metrics, checkpoints and the model go there.
        train: Settings of the retrofit.
        evaluation_tokens: Tokens of the validation part on which ratio and perplexity are measured.
        overwrite: Start anew even if the run folder holds a run.
    """

    model: str
    ratio: float = 4.0
    method: str = "dmc"
    data: str = "builtin:stdlib"
    out: str = "runs/dmc"
    train: RetrofitSettings = field(default_factory=RetrofitSettings)
    evaluation_tokens: int = 8192
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.train = dataclasses.replace(self.train, ratio=self.ratio, method=self.method)
        self.train.check_rows(self.train.context)


@documented
@dataclass
class ShowVerb(ModelSettings):
    """Settings of `dmc show`.

    Args:
        model: Folder of a model that `dmc retrofit` made.
        text: Text to look at.
        layer: Show this layer only.
        head: Show this head of each layer only.
        out: HTML file for all layers and heads; none unless given.
    """

    model: str
    text: str
    layer: int | None = None
    head: int | None = None
    out: str = ""


@documented
@dataclass
class DmcEval(ModelSettings):
    """Settings of `dmc eval`.

    Args:
        model: Folder of a model that `dmc retrofit` made.
        data: Text: hub dataset, local file or folder, or builtin:stdlib.
        split: Part of the text: validation, train or all.
        tokens: Tokens to measure on.
        context: Tokens per window.
    """

    model: str
    data: str = "builtin:stdlib"
    split: str = "validation"
    tokens: int = 8192
    context: int = 512


def retrofit_model(settings: RetrofitVerb) -> dict[str, Any]:
    """Retrofit the model, or go on with it; returns its measures. Raises a `NestlingError` before any long work."""
    source = Source.open(settings)
    if dmc.is_converted(source.model):
        raise NestlingError(f"the cache of '{settings.model}' is compressed already: start from the stock model")
    check(Anatomy.of(source.model))
    data.batches(settings.data, source.tokenizer, context=settings.train.context, tokens=settings.train.context)
    split_batch(settings.train, settings.train.context, source.model.device)
    run = Run("dmc retrofit", settings, settings.out, settings.overwrite)
    stages, context = Stages(3), settings.train.context
    with stages("measure the model as it is"):
        before = run.values("before.json", lambda: _perplexity(source, settings.data, settings, context))
    with stages(f"retrofit to {settings.ratio:g} tokens per slot"):
        target = run.model("model", lambda: _retrofitted(settings, source, run), source.tokenizer)
    with stages("measure the model as it became"):
        result = run.values("measured.json", lambda: _measured(settings, str(target), before))
    run.write("report.html", _page(str(target), result))
    result.pop("excerpt", None)
    console.print(_summary(result))
    if result["compression"]["ratio"] < WELL_MET * result["asked"]:
        console.print(
            f"{settings.ratio:g} tokens per slot were asked for: the gates do not tell enough tokens apart yet; train "
            f"on more (--train.tokens), or let them learn faster (--train.scale)"
        )
    console.print(f"model: {target}")
    return {"model": str(target), **result}


def show(settings: ShowVerb) -> dict[str, Any]:
    """Print the text cut where slots begin, and write a page if asked to."""
    source = Source.open(settings)
    found = merges(source.model, source.tokenizer, settings.text)
    for layer, head in _places(found, settings.layer, settings.head):
        slots = " [bold blue]|[/] ".join(escape(slot.replace("\n", "⏎")) for slot in found.slots(layer, head))
        console.print(f"[dim]layer {layer}, head {head}, {found.ratio(layer, head):.2f} tokens per slot[/]\n  {slots}")
    console.print(f"{found.whole:.2f} tokens per slot over {len(found.tokens)} tokens")
    if settings.out:
        texts = {place: found.slots(*place) for place in _places(found, settings.layer, settings.head)}
        opened = found.opened.items()
        ratios = {layer: [found.ratio(layer, head) for head in range(len(heads))] for layer, heads in opened}
        page = slots_page(f"{settings.model}: which tokens share a slot", ratios, texts=texts)
        write_atomically(Path(settings.out), lambda path: path.write_text(page, encoding="utf-8"))
        console.print(f"page: {settings.out}")
    return {"ratio": found.whole, "tokens": len(found.tokens), "page": settings.out or None}


def dmc_eval(settings: DmcEval) -> dict[str, Any]:
    """Perplexity with the decisions of decoding, tokens per slot, and bytes of the cache after a window."""
    source = Source.open(settings)
    found = dmc.measure(source.model, _batches(source, settings.data, settings.split, settings, settings.context))
    loss = _perplexity(source, settings.data, settings, settings.context, settings.split)
    result = {"perplexity": loss["perplexity"], "compression": found.to_dict()} | _cached(source, settings)
    console.print(_summary(result))
    return result


def _retrofitted(settings: RetrofitVerb, source: Source, run: Run) -> PreTrainedModel:
    """The model of the source, in place, with what it merges on text that it has not seen in its config."""
    model, context = source.model, settings.train.context
    dmc.retrofit(model, settings.data, source.tokenizer, settings.train, run_dir=run.folder)
    found = dmc.measure(model, _batches(source, settings.data, "validation", settings, context))
    model.config.dmc["measured"] = found.to_dict()
    return model


def _measured(settings: RetrofitVerb, target: str, before: dict[str, float]) -> dict[str, Any]:
    source = Source.open(dataclasses.replace(settings, model=target))
    after = _perplexity(source, settings.data, settings, settings.train.context)
    gates, compression = source.model.config.dmc, source.model.config.dmc["measured"]
    perplexity = {"perplexity": after["perplexity"], "perplexity_before": before["perplexity"]}
    learned = gates.get("learned", compression)["ratio"]
    told = perplexity | {"asked": gates["ratio"], "learned": learned, "compression": compression}
    return told | {"excerpt": _excerpt(source, settings.data)}


def _excerpt(source: Source, text: str) -> list[tuple[int, int, list[str]]]:
    """Layer, head and the text of each slot, for a little text that was not trained on."""
    how: dict[str, Any] = {"context": EXCERPT, "tokens": EXCERPT, "split": "validation"}
    ids = data.batches(text, source.tokenizer, **how)[0]["input_ids"][0]
    found = merges(source.model, source.tokenizer, str(source.tokenizer.decode(ids)))
    return [(*place, found.slots(*place)) for place in _places(found)]


def _perplexity(source: Source, text: str, settings: Any, context: int, split: str = "validation") -> dict[str, float]:
    tokens = getattr(settings, "evaluation_tokens", 0) or settings.tokens
    found = measured("perplexity", source.model, source.tokenizer, text, tokens, context=context, split=split)
    return {"perplexity": found["perplexity"], "loss": found["loss"]}


def _batches(source: Source, text: str, split: str, settings: Any, context: int) -> Iterator[dict[str, Tensor]]:
    tokens = getattr(settings, "evaluation_tokens", 0) or settings.tokens
    parts = data.batches(text, source.tokenizer, context=context, tokens=tokens, batch_size=4, split=split)
    with bar("tokens per slot, batches", len(parts)) as advance:
        for part in parts:
            yield part
            advance(1)


def _cached(source: Source, settings: DmcEval) -> dict[str, int]:
    """Bytes of the cache that one window leaves, beside those of a full one."""
    options: Any = {"context": settings.context, "tokens": settings.context, "split": settings.split}
    ids = data.batches(settings.data, source.tokenizer, **options)[0]["input_ids"][:1]
    with torch.no_grad():
        cache = source.model(input_ids=ids.to(source.model.device), use_cache=True)[cache_name(source.model)]
    item = source.model.dtype.itemsize
    full = sum(2 * layer.length.shape[1] * layer.keys.shape[-1] * item for layer in dmc.slot_layers(cache))
    return {"cache_bytes": dmc.cache_bytes(cache), "full_cache_bytes": full * ids.shape[1]}


def _places(found: Merges, layer: int | None = None, head: int | None = None) -> list[tuple[int, int]]:
    """Layers and heads, or those of one. Raises `NestlingError` when there is none."""
    places = [(number, place) for number, heads in found.opened.items() for place in range(len(heads))]
    chosen = [place for place in places if layer in (None, place[0]) and head in (None, place[1])]
    if not chosen:
        layers = ", ".join(map(str, found.opened))
        raise NestlingError(f"there is no layer {layer} with a head {head}: layers are {layers}")
    return chosen


def _page(model: str, result: dict[str, Any]) -> str:
    compression = result["compression"]
    ratios = dict(zip(compression["layers"], compression["by_head"], strict=True))
    texts = {(layer, head): slots for layer, head, slots in result.get("excerpt", [])}
    title = f"{model}: {compression['ratio']:.2f} tokens per slot"
    return slots_page(title, ratios, compression["by_position"], texts, _measures(result))


def _measures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values, as far as they were measured."""
    rows = [("perplexity", f"{result['perplexity']:.3f}")]
    if "perplexity_before" in result:
        rows = [("perplexity before", f"{result['perplexity_before']:.3f}"), *rows]
    if "asked" in result:
        rows += [("tokens per slot asked for", f"{result['asked']:g}")]
        rows += [("tokens per slot as trained", f"{result['learned']:.2f}")]
    return [*rows, ("tokens per slot", f"{result['compression']['ratio']:.2f}")]


def _summary(result: dict[str, Any]) -> Table:
    compression = result["compression"]
    table = Table(title="compressed cache", title_justify="left", box=None, pad_edge=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    for row in _measures(result):
        table.add_row(*row)
    for layer, ratio in zip(compression["layers"], compression["by_layer"], strict=True):
        table.add_row(f"  layer {layer}", f"{ratio:.2f}")
    if "cache_bytes" in result:
        table.add_row("cache, bytes", f"{result['cache_bytes']:,} of {result['full_cache_bytes']:,}")
    return table
