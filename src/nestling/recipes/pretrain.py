"""`nestling pretrain`: from an architecture and text to a trained checkpoint, into one resumable run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from nestling.anatomy import Anatomy
from nestling.data import check_tokenizer
from nestling.hub.load import tokenizer_beside
from nestling.pretrain import PretrainSettings, architecture_config, build, pretrain
from nestling.recipes.progress import console
from nestling.recipes.run import Run
from nestling.recipes.scratch import (
    ScratchSettings,
    fields,
    given_tokenizer,
    trained_model,
    trained_tokenizer,
    validated,
)
from nestling.report.human import count, figure
from nestling.train import documented


@documented
@dataclass
class PretrainVerb(ScratchSettings):
    """Settings of `pretrain`.

    Args:
        architecture: dense-3m, hybrid-2m, hybrid-4m or mamba2-3m; a YAML or JSON file with model_type and config
            fields; or a checkpoint (hub id, folder, builtin:smollm2-135m-instruct), whose weights are not taken.
        out: Run folder; metrics, checkpoints and the trained model go there.
        train: Settings of the training.
    """

    architecture: str
    out: str = "runs/pretrain"
    train: PretrainSettings = field(default_factory=PretrainSettings)


def pretrain_model(settings: PretrainVerb) -> dict[str, Any]:
    """Train the model, or go on with it; returns where it is and its loss on text that it has not seen.

    Raises a `NestlingError` for anything wrong with the settings before any long work starts.
    """
    config = architecture_config(settings.architecture, fields(settings.set), settings.trust_remote_code)
    given = given_tokenizer(settings)
    own = settings.tokenizer is None and given is not None
    if given is not None and own:
        check_tokenizer(given, config.vocab_size)
    anatomy = Anatomy.known(config)
    if anatomy is not None and anatomy.routed_layers():
        console.print("routers get no balance loss here: nestling moe train gives them one, and reports their load")
    run = Run("pretrain", settings, settings.out, settings.overwrite)
    tokenizer = given or trained_tokenizer(settings, run)
    if not own:
        tokenizer = tokenizer_beside(tokenizer, config.model_type)

    def trained() -> PreTrainedModel:
        model = build(config, None if own else tokenizer, settings.train.seed, settings.device)
        console.print(f"{config.model_type}, {count(model.num_parameters())} parameters")
        return pretrain(model, settings.data, tokenizer, settings.train, run_dir=run.folder)

    target = run.model("model", trained, tokenizer)
    summary = run.values("pretrained.json", lambda: validated(settings, trained_model(settings, target), tokenizer))
    console.print(f"validation loss {figure(summary['loss'])}\nmodel: {target}")
    return {"model": str(target), **summary}
