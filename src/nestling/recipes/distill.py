"""`nestling distill`: retrain a student from its teacher, into one resumable run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nestling import hub
from nestling.distill import DistillSettings, distill
from nestling.recipes.progress import console
from nestling.recipes.run import Run
from nestling.recipes.source import Source


@dataclass
class DistillVerb:
    """Settings of `distill`.

    Args:
        student: Folder of the model to train, as `nestling prune` wrote it.
        teacher: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        data: Training text: hub dataset, local file or folder, or builtin:stdlib.
        out: Run folder; metrics, checkpoints and the trained model go there.
        distill: Settings of the distillation.
        dtype: Of the weights: auto, float32, bfloat16 or float16.
        device: Where to compute; the best there is unless given.
        trust_remote_code: Let the checkpoints run code of their own.
        overwrite: Start anew even if the run folder holds a run.
    """

    student: str
    teacher: str
    data: str = "builtin:stdlib"
    out: str = "runs/distill"
    distill: DistillSettings = field(default_factory=DistillSettings)
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False


def distill_model(settings: DistillVerb) -> dict[str, Any]:
    """Train the student, or go on with it; returns where the model is."""
    teacher = Source.open(settings, "teacher")
    student, tokenizer = hub.load(
        settings.student,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )
    run = Run("distill", settings, settings.out, settings.overwrite)
    target = run.path("model")
    if not target.exists():
        child = distill(student, teacher.model, settings.data, teacher.tokenizer, settings.distill, run_dir=run.folder)
        hub.save(child, target, tokenizer or teacher.tokenizer)
    console.print(f"model: {target}")
    return {"model": str(target), "tokens": settings.distill.tokens}
