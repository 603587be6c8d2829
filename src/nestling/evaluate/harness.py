"""Task suites by name, through EleutherAI's lm-evaluation-harness (the package lm-eval, an optional dependency).

The model that is in memory is handed over as it is. Task data comes from the hub, unless a task of your own names
local files: put its YAML into a folder and give that as `include_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling.anatomy.bypass import evaluating
from nestling.errors import DataError, NestlingError


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """lm-eval's results: task name -> metric -> value, e.g. `["hellaswag"]["acc_norm,none"]`.

    `tasks` are names, patterns or groups as lm-eval knows them, `limit` is the number of examples per task. Raises
    `NestlingError` without lm-eval, `DataError` for an unknown task or one whose data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NestlingError('tasks by name need the package lm-eval: pip install "nestling[eval]"') from error
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    matched = _known(manager, names)
    with evaluating(model):
        try:
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=matched,
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ConnectionError, ValueError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"the tasks {', '.join(names)} cannot be run ({text[0]}): check the network, or use local data"
            ) from error
    return dict(found["results"]) if found else {}


def _known(manager: Any, names: list[str]) -> list[str]:
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise DataError(f"lm-eval knows no task '{unknown[0]}': `lm-eval ls tasks` lists them")
    return list(manager.match_tasks(names))
