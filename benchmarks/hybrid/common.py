"""What the benchmarks of hybrids share: the trained parent of a seed, held-out loss, short trainings, a wrong order."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestling import data, hub
from nestling.distill import distill
from nestling.pretrain import PretrainSettings, build, pretrain
from nestling.recipes.pretrain import PretrainVerb, pretrain_model
from nestling.search import token_loss

ARCHITECTURE = Path(__file__).parent / "parent.yaml"
TEXT = "builtin:stdlib"
CONTEXT = 128
PARENT_TOKENS = 450_000
WORK = Path("runs/benchmarks/hybrid")


def parent(seed: int, work: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The hybrid that is cut, trained here first unless `work` holds it."""
    folder = work / f"parent-{seed}"
    if not (folder / "model").exists():
        pretrain_model(
            PretrainVerb(
                str(ARCHITECTURE),
                data=TEXT,
                out=str(folder),
                vocab_size=512,
                evaluation_tokens=16384,
                train=training(PARENT_TOKENS, seed),
            )
        )
    model, tokenizer = hub.load(folder / "model")
    assert tokenizer is not None, "a pretrained model has its tokenizer"
    return model.requires_grad_(False), tokenizer


def training(tokens: int, seed: int) -> PretrainSettings:
    """How the parent is trained, and models of its children's shapes from scratch."""
    return PretrainSettings(
        tokens=tokens,
        context=CONTEXT,
        batch_size=8,
        micro_batch_size=8,
        learning_rate=4e-3,
        log_every=10,
        seed=seed,
    )


class Ground:
    """Text that a parent's children are ranked, judged and distilled on; judged on the validation part alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, held_out: int = 16384, kd_tokens: int = 60_000):
        rows = {"context": CONTEXT, "seed": seed}
        self.calibration = data.batches(TEXT, tokenizer, tokens=16384, **rows)
        self.loss = token_loss(data.batches(TEXT, tokenizer, tokens=held_out, split="validation", **rows))
        self._training = data.batches(TEXT, tokenizer, tokens=kd_tokens, **(rows | {"seed": seed + 100}))
        self._tokenizer, self._seed = tokenizer, seed

    def distilled(self, child: PreTrainedModel, teacher: PreTrainedModel, tokens: int | None = None) -> float:
        """Held-out loss of a copy of the child after a short distillation, on all of the text unless given."""
        student = copy.deepcopy(child)
        tokens = tokens or sum(batch["input_ids"].numel() for batch in self._training)
        settings = {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3, "seed": self._seed}
        distill(student, teacher, self._training, tokens=tokens, **settings)
        return self.loss(student)

    def from_scratch(self, config: Any, tokens: int) -> PreTrainedModel:
        """A model of fresh weights, trained on the text alone under a whole schedule."""
        model = build(copy.deepcopy(config), self._tokenizer, self._seed)
        return pretrain(model, TEXT, self._tokenizer, training(tokens, self._seed))


def permuted(mixer: Any, heads: list[int]) -> None:
    """Put the heads of a Mamba-2 mixer in this order in every tensor, groups disregarded; B and C stay in place."""
    p, inner = mixer.head_dim, mixer.intermediate_size
    shared = list(range(2 * mixer.n_groups * mixer.ssm_state_size))
    rows = [head * p + channel for head in heads for channel in range(p)]
    conv = rows + [inner + i for i in shared]
    projected = rows + [inner + i for i in conv] + [2 * inner + len(shared) + head for head in heads]
    for tensor, index in (
        (mixer.in_proj.weight, projected),
        (mixer.conv1d.weight, conv),
        (mixer.conv1d.bias, conv),
        (mixer.A_log, heads),
        (mixer.D, heads),
        (mixer.dt_bias, heads),
        (mixer.norm.weight, rows),
    ):
        _in_place(tensor, tensor.detach()[index])
    _in_place(mixer.out_proj.weight, mixer.out_proj.weight.detach()[:, rows])


def _in_place(tensor: Tensor, values: Tensor) -> None:
    tensor.detach().copy_(values.clone())
