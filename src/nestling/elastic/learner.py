"""The loss of elastic training: members of several budgets learn from one teacher on the same batch.

While the router learns, the parent runs under soft masks whose chances lie on each budget (`target.project`); then the
shapes are fixed (`target.harden`) and every member runs on slices of the parent, at its own cost. The teacher's
forward pass is shared by all members of a step. What a step draws (members, noise, schedules) follows from (seed,
step) alone, so neither an interruption nor the number of processes changes it. Paper: Nemotron Elastic,
arXiv 2511.16664, sections 3.3 to 3.5, with the budget as a constraint instead of a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import decoder, logits_head
from nestling.elastic.harden import harden
from nestling.elastic.member import Member, connect
from nestling.elastic.prior import even
from nestling.elastic.router import Router, gumbel, relaxed
from nestling.elastic.settings import WHOLE, ElasticSettings
from nestling.elastic.soft import Softened
from nestling.elastic.space import PerChoice, PerRow, Space
from nestling.elastic.target import Target, project
from nestling.evaluate.score import token_losses
from nestling.ranking import Ranking
from nestling.surgery.choose import choose
from nestling.train import (
    Head,
    Learner,
    LogitLosses,
    Objective,
    Student,
    TopK,
    model_inputs,
    recompute,
    recomputes,
    shared_losses,
)
from nestling.train.sharding import gathered


@dataclass(frozen=True)
class Plan:
    """What a family is trained to: the choices there are, the ranking of the sorted parent, and the budgets."""

    space: Space
    ranking: Ranking
    targets: tuple[Target, ...]


@dataclass
class _Step:
    """One micro-batch: what backbones are called with, targets, what sums are divided by, what the teacher says.

    taught: its last hidden states, or what was kept of its distributions.
    """

    inputs: dict[str, Any]
    labels: Tensor
    count: Tensor | float | None
    taught: Tensor | TopK | None = None


class ElasticLearner(Learner):
    """A sorted parent, its router, and the shapes once they are fixed.

    shapes: sizes `[rows]` by knob for each budget, to train without a router. losses: what every choice is expected to
    lose, for each budget (see `prior`); `even` unless given. text: batches to settle between shapes on.
    """

    gathers_all = True  # members are windows on whole matrices

    def __init__(
        self,
        parent: PreTrainedModel,
        teacher: PreTrainedModel | None,
        plan: Plan,
        settings: ElasticSettings,
        shapes: Sequence[Mapping[str, Tensor]] | None = None,
        losses: Sequence[PerChoice] | None = None,
        text: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__(parent, teacher)
        self.plan, self.settings = plan, settings
        self.text = text
        known = losses or [even(plan.space, target) for target in plan.targets]
        dtype = torch.promote_types(parent.dtype, torch.float32)  # that of all that is trained, for sharding
        self.router = Router(plan.space, known, seed=settings.seed, dtype=dtype)
        self.rates = {"router.": settings.router_learning_rate / settings.learning_rate}
        rows = sum(len(knob.rows) for knob in plan.space.knobs.values())
        self.sizes: Tensor
        self.register_buffer("sizes", torch.zeros(len(plan.targets), rows, dtype=torch.long))  # 0 until they are fixed
        self.shares = settings.shares(len(plan.targets))
        self.step, self.done = 0, 0.0
        self.drawn: list[int] = []
        self._softened = Softened(parent, plan.space)
        self._members: dict[int, Member] = {}
        self._used: set[int] = set()
        if shapes is not None:
            self._fix(shapes)

    @property
    def settled(self) -> bool:
        """Whether the shapes are fixed."""
        return bool((self.sizes > 0).all())

    def begin(self, step: int, steps: int) -> None:
        routing = round(self.settings.routing * steps)
        self.step, self.done = step, step / max(1, routing)
        self.drawn = draw(self.shares, self.settings.members_per_step, self.settings.seed, step)
        if step >= routing and not self.settled:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Fix every member's shape, on its budget: the one that loses least by the text of three.

        They are what the router wishes for, without noise, what was known before it learned, and the same part of
        every axis. Without text it is the router's.
        """
        with gathered(self):
            found = processes.tensors(lambda: {str(number): sizes for number, sizes in enumerate(self._settled())})
        counts = [len(knob.rows) for knob in self.plan.space.knobs.values()]
        rows = [found[str(number)].cpu().split(counts) for number in range(len(self.plan.targets))]
        self._fix([dict(zip(self.plan.space.knobs, row, strict=True)) for row in rows])

    def _settled(self) -> list[Tensor]:
        space, shapes, larger = self.plan.space, [torch.zeros(0)] * len(self.plan.targets), None
        for number in self.by_size():
            target = self.plan.targets[number]
            scale = self.settings.scale_end if self.settings.routing else 1.0
            wishes = [self.router(number, scale)]
            if self.text:
                wishes += [self.router.known(number), {field: -loss for field, loss in even(space, target).items()}]
            on_budget = [
                harden(space, target, _on_cpu(wish), larger if self.settings.chain else None) for wish in wishes
            ]
            best = min(on_budget, key=self._loss) if self.text else on_budget[0]
            shapes[number], larger = torch.cat([best[field] for field in space.knobs]), best
        return shapes

    def _loss(self, chosen: PerRow) -> float:
        """Nats per token of a member with these sizes, on the text."""
        space = self.plan.space
        member = Member(self.student, choose(space.anatomy, self.plan.ranking, space.shape(chosen)))
        ids = [batch["input_ids"].to(self.student.device) for batch in self.text]
        losses = [token_losses(member.model, part[:, :-1], part[:, 1:]).double().sum().item() for part in ids]
        return sum(losses) / sum(part[:, 1:].numel() for part in ids)

    def by_size(self) -> list[int]:
        """The budgets, largest first."""
        whole = self.plan.space.largest()
        return sorted(
            range(len(self.plan.targets)), key=lambda i: self.plan.targets[i].of_sizes(self.plan.space, whole)
        )

    def chosen(self, number: int) -> dict[str, Tensor]:
        """The fixed sizes `[rows]` of a budget, by knob."""
        counts = [len(knob.rows) for knob in self.plan.space.knobs.values()]
        return dict(zip(self.plan.space.knobs, self.sizes[number].cpu().split(counts), strict=True))

    def recomputed(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return self._softened.recomputed()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        teacher_indices: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
        teacher_rest: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, and each member's own by name; see `Learner.forward`.

        teacher_...: what a cache kept of the teacher (`TopK`) `[batch, seq, k]`, instead of running it.
        """
        inputs = model_inputs(input_ids, attention_mask)
        step = _Step(inputs, labels, num_items_in_batch)
        self._used = set()
        losses, parts = [], {}
        if self.settings.teacher == "trainable":
            step.taught, guard, parts[f"ce {WHOLE}"] = self._teach_itself(step)
            losses.append(guard)
        elif teacher_indices is not None and teacher_log_probs is not None and teacher_rest is not None:
            step.taught = TopK(teacher_indices, teacher_log_probs, teacher_rest)
        elif self.teacher is not None:
            step.taught = self.teach(inputs)
        if self.settled:
            connect([self._member(number) for number in self._weights() if number >= 0])
        for label, found in self._member_losses(step).items():
            losses.append(found.loss)
            parts[label] = found.cross_entropy if self.settings.teacher == "none" else found.divergence
        return {"loss": torch.stack(losses).sum() + self._unused(), **parts}

    def _teach_itself(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        """The parent as teacher: its last hidden states, the cross-entropy that keeps it from drifting, its value."""
        hidden = decoder(self.student)(**step.inputs).last_hidden_state
        guard = Objective(kd_weight=0.0, ce_weight=self.settings.ce_weight)
        losses = self.logit_losses(hidden, step.labels, guard, count=step.count)
        self._used |= {id(p) for p in self.student.parameters()}
        return hidden.detach(), losses.loss, losses.cross_entropy

    def _member_losses(self, step: _Step) -> dict[str, LogitLosses]:
        """The weighted losses of this step's members, which share one pass of the teacher's head."""
        trainable, students = self.settings.teacher == "trainable", {}
        for number, weight in self._weights().items():
            if number >= 0 or not trainable:
                with self._running(number) as model:
                    hidden = decoder(model)(**step.inputs).last_hidden_state
                    head = Head(logits_head(model), (_output_weight(model),))
                students[self._label(number)] = Student(hidden, head, weight)
        if not students:
            return {}
        teaches = logits_head(self.student) if trainable else self._teacher_head
        objective = self.settings.objective()
        found = shared_losses([*students.values()], step.taught, teaches, step.labels, objective, count=step.count)
        return dict(zip(students, found, strict=True))

    def _weights(self) -> dict[int, float]:
        """Members of this step (-1 is the parent) and the weights of their losses."""
        drawn = self.drawn or list(range(-1, len(self.plan.targets)))
        if self.settings.members_per_step:
            return {number: drawn.count(number) / len(drawn) for number in dict.fromkeys(drawn)}
        return {number: self.shares[number + 1] for number in drawn if self.shares[number + 1] > 0}

    @contextmanager
    def _running(self, number: int) -> Iterator[PreTrainedModel]:
        """A member ready to run; what it uses of the parent is noted."""
        if number >= 0 and self.settled:
            member = self._member(number)
            self._used |= {id(tensor) for tensor in member.used()}
            yield member.model
            return
        self._used |= {id(p) for p in self.student.parameters()}
        if number < 0:
            yield self.student
        else:
            with self._softened.under(self.chances(number)) as model:
                yield model

    def chances(self, number: int) -> dict[str, Tensor]:
        """What this step puts into the forward pass for a budget: chances `[rows, choices]` on it, with noise."""
        tau, scale = self.settings.schedule().at(min(1.0, self.done))
        noise = gumbel(self.plan.space, self.settings.seed, self.step, number)
        logits = {field: value.double().cpu() + noise[field] for field, value in self.router(number, scale).items()}
        found = project(self.plan.space, self.plan.targets[number], logits, tau)
        return relaxed(found.chances, self.settings.masks)

    def _member(self, number: int) -> Member:
        if number not in self._members:
            space = self.plan.space
            shape = space.shape(self.chosen(number))
            self._members[number] = Member(self.student, choose(space.anatomy, self.plan.ranking, shape))
            model = self._members[number].model.train(self.student.training)
            if recomputes(self.student):
                recompute(model)
        return self._members[number]

    def _fix(self, shapes: Sequence[Mapping[str, Tensor]]) -> None:
        rows = [torch.cat([shape[field] for field in self.plan.space.knobs]) for shape in shapes]
        self.sizes.copy_(torch.stack(rows))
        self._members.clear()

    def _label(self, number: int) -> str:
        kind = "ce" if self.settings.teacher == "none" else "kl"
        return f"{kind} {WHOLE if number < 0 else self.plan.targets[number].name}"

    def _unused(self) -> Tensor:
        """Zero, which gives the parameters that this step does not use a gradient of zero.

        So every process and every step has a gradient for every parameter, whatever was drawn.
        """
        left = [p for p in self.parameters() if p.requires_grad and id(p) not in self._used]
        return torch.stack([0.0 * p.reshape(-1)[0].float() for p in left]).sum()


def draw(shares: Sequence[float], count: int, seed: int, step: int) -> list[int]:
    """Members of a step, -1 for the parent: `count` draws by their shares, or all of them once if 0."""
    if not count:
        return list(range(-1, len(shares) - 1))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    drawn = torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)
    return [int(number) - 1 for number in drawn]


def _output_weight(model: PreTrainedModel) -> Tensor:
    """The output matrix as the model sees it now: a window on the parent's, where it is connected."""
    output: Any = model.get_output_embeddings()
    return output.weight


def _on_cpu(logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {field: value.double().cpu() for field, value in logits.items()}
