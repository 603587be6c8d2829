"""The chunked loss against a plain float64 reference: values, gradients of hidden states and of the head, masks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestling.errors import NestlingError
from nestling.train.divergences import DIVERGENCES, at, divergence, top_k
from nestling.train.losses import IGNORE, Head, Objective, Student, logit_losses, shared_losses

VOCAB, NARROW, WIDE = 37, 8, 11


class Case:
    """Random hidden states and heads with a bias and a soft cap; the student's width differs from the teacher's."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(3)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = random(3, 7, NARROW).requires_grad_()
        self.weight = random(VOCAB, NARROW).requires_grad_()
        self.bias = random(VOCAB).requires_grad_()
        self.teacher_hidden, self.teacher_weight = random(3, 7, WIDE), random(VOCAB, WIDE)
        self.targets = torch.randint(0, VOCAB, (3, 7), generator=generator)
        self.targets[0, 2:] = IGNORE
        self.targets[2, 6] = IGNORE

    def head(self, hidden):
        return torch.tanh(F.linear(hidden, self.weight, self.bias) / 3) * 3

    def teacher_head(self, hidden):
        return F.linear(hidden, self.teacher_weight)

    @property
    def leaves(self):
        return self.hidden, self.weight, self.bias

    def chunked(self, objective=None, **options):
        head = Head(self.head, (self.weight, self.bias))
        return logit_losses(
            self.hidden, head, self.teacher_hidden, self.teacher_head, self.targets, objective, **options
        )


def kl(first, second):
    return sum(a * (a.log() - b.log()) for a, b in zip(first, second, strict=True))


DEFINED = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "mse": lambda p, q: sum((a - b) ** 2 for a, b in zip(p, q, strict=True)),
    "cosine": lambda p, q: 1 - (p @ q) / (p @ p).sqrt() / (q @ q).sqrt(),
    "logit_mse": lambda p, q: (p.log() - q.log()).var(correction=0),
}


def classes(objective, p, q):
    """Both distributions over the teacher's likeliest tokens, and a class for the others."""
    if not 0 < objective.top_k < VOCAB:
        return p, q
    likely = sorted(range(VOCAB), key=lambda v: -p[v])
    kept, others = likely[: objective.top_k], likely[objective.top_k :]
    if objective.remaining_mass:
        return tuple(torch.cat([x[kept], x[others].sum()[None]]) for x in (p, q))
    return tuple(x[kept] / x[kept].sum() for x in (p, q))


def reference(case, objective):
    """Token by token, from the definitions."""
    total = torch.zeros((), dtype=torch.float64)
    tau, tokens = objective.temperature, 0
    for row in range(3):
        for place in range(7):
            target = case.targets[row, place]
            if target == IGNORE:
                continue
            tokens += 1
            student = case.head(case.hidden[row, place])
            p = torch.softmax(case.teacher_head(case.teacher_hidden[row, place]) / tau, -1)
            q = torch.softmax(student / tau, -1)
            apart = DEFINED[objective.divergence](*classes(objective, p, q))
            factor = tau**2 if objective.scale_by_temperature else 1
            total = total + objective.kd_weight * factor * apart
            total = total - objective.ce_weight * torch.softmax(student, -1)[target].log()
    return total / tokens


OBJECTIVES = [
    Objective(),
    Objective("reverse_kl"),
    Objective(temperature=2.5, ce_weight=0.3),
    Objective(temperature=0.5, scale_by_temperature=True),
    Objective("reverse_kl", temperature=3.0, kd_weight=0.7, ce_weight=1.5),
    Objective(kd_weight=0.0, ce_weight=1.0),
    *(Objective(name, temperature=1.7) for name in DEFINED),
    *(Objective(name, top_k=5, temperature=0.8) for name in DEFINED),
    *(Objective(name, top_k=5, remaining_mass=False, ce_weight=0.2) for name in DEFINED),
    Objective(top_k=VOCAB - 1),
    Objective(top_k=10 * VOCAB),
    Objective(top_k=VOCAB, remaining_mass=False),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 5, None])
def test_equals_the_plain_computation(objective, chunk_tokens):
    case = Case()
    expected = reference(case, objective)
    found = case.chunked(objective, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(3 * found.loss, case.leaves)
    for ours, plain in zip(gradients, torch.autograd.grad(3 * expected, case.leaves), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_other_dtypes_stay_close_to_float64(dtype, tolerance):
    exact, case = Case(), Case(dtype)
    found, expected = case.chunked(chunk_tokens=4), reference(exact, Objective())
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected, rtol=tolerance, atol=tolerance)
    gradients = torch.autograd.grad(found.loss, case.leaves)
    for ours, plain in zip(gradients, torch.autograd.grad(expected, exact.leaves), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - plain).norm() <= tolerance * plain.norm()


def test_half_precision_is_summed_in_float32():
    """Many chunks lose nothing: one gradient per token, added up, equals the gradient of one chunk."""
    one, many = Case(torch.bfloat16), Case(torch.bfloat16)
    torch.autograd.backward(one.chunked(chunk_tokens=1000).loss)
    torch.autograd.backward(many.chunked(chunk_tokens=1).loss)
    assert (one.weight.grad - many.weight.grad).float().norm() <= 1e-2 * one.weight.grad.float().norm()


def test_no_two_divergences_are_the_same():
    case = Case()
    losses = [case.chunked(Objective(name)).loss.item() for name in DEFINED]
    losses += [case.chunked(Objective(top_k=5, remaining_mass=rest)).loss.item() for rest in (True, False)]
    assert len({round(loss, 4) for loss in losses}) == len(losses)
    assert case.chunked(Objective(top_k=VOCAB)).loss == case.chunked().loss


def test_top_k_of_one_certain_token_keeps_the_digits_of_the_rest():
    """A mass of 1e-12 beside a certain token is not lost in 1 - p, in float32 as in float64."""
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 30.0
    kept = top_k(logits.log_softmax(-1), 1)
    assert kept.indices.item() == 3
    torch.testing.assert_close(kept.rest.double(), torch.tensor([VOCAB - 1.0]).double().log() - 30, rtol=1e-5, atol=0)


def test_a_kept_distribution_is_worth_as_much_as_the_teacher():
    """`TopK` in the place of hidden states: the same loss and gradients; in float16, the same to its rounding."""
    case, objective = Case(), Objective(top_k=6, temperature=1.5, ce_weight=0.1)
    live = case.chunked(objective)
    gradient = torch.autograd.grad(live.loss, case.hidden)[0]
    kept = top_k((case.teacher_head(case.teacher_hidden) / 1.5).log_softmax(-1), 6)
    head = Head(case.head, (case.weight, case.bias))
    for given, tolerance in ((kept, 1e-12), (kept.map(lambda t: t.half() if t.is_floating_point() else t), 2e-3)):
        found = logit_losses(case.hidden, head, given, case.teacher_head, case.targets, objective, chunk_tokens=4)
        torch.testing.assert_close(found.loss, live.loss, rtol=tolerance, atol=tolerance)
        ours = torch.autograd.grad(found.loss, case.hidden)[0]
        assert (ours - gradient).norm() <= tolerance * gradient.norm()


def test_every_token_is_told():
    case = Case()
    found = case.chunked(Objective(ce_weight=0.5), chunk_tokens=4)
    assert found.tokens.shape == case.targets.shape
    assert not found.tokens.requires_grad
    assert (found.tokens[case.targets == IGNORE] == 0).all()
    torch.testing.assert_close(found.tokens.sum() / (case.targets != IGNORE).sum(), found.divergence)


def test_teacher_equal_to_student_gives_nothing():
    case = Case()
    case.teacher_hidden, case.teacher_head = case.hidden.detach(), case.head
    found = case.chunked()
    assert abs(found.loss) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(found.loss, case.leaves))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_never_negative(name):
    case = Case()
    for how in ({}, {"top_k": 4}, {"top_k": 4, "remaining_mass": False}):
        assert all(case.chunked(Objective(name, temperature=tau, **how)).loss > 0 for tau in (0.3, 1.0, 4.0))


def test_ignored_tokens_contribute_nothing():
    case = Case()
    before = case.chunked()
    gradient = torch.autograd.grad(before.loss, case.hidden, retain_graph=False)[0]
    assert (gradient[case.targets == IGNORE] == 0).all()
    with torch.no_grad():
        case.hidden[case.targets == IGNORE] += 100
        case.teacher_hidden[case.targets == IGNORE] -= 100
    torch.testing.assert_close(case.chunked().loss, before.loss)
    case.targets[case.targets == IGNORE] = 1
    assert abs(case.chunked().loss - before.loss) > 1e-2  # negative control: unmasked, they count


def test_nothing_but_ignored_tokens():
    case = Case()
    case.targets.fill_(IGNORE)
    loss = case.chunked().loss
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, case.leaves))


def test_parts_and_count():
    case = Case()
    real = int((case.targets != IGNORE).sum())
    found = case.chunked(Objective(ce_weight=0.5))
    torch.testing.assert_close(found.loss, found.divergence + 0.5 * found.cross_entropy)
    torch.testing.assert_close(case.chunked(count=2 * real).divergence, found.divergence / 2)
    assert not found.divergence.requires_grad
    assert not found.cross_entropy.requires_grad


def test_temperature_squared_does_nothing_at_one():
    case = Case()
    assert case.chunked(Objective()).loss == case.chunked(Objective(scale_by_temperature=True)).loss


def test_tied_weight_gets_both_gradients():
    """One matrix as embedding and head: its gradient is the sum of the two, as in the plain computation."""
    case, ids = Case(), torch.arange(21).view(3, 7)

    def gradient(chunked):
        weight = case.weight.detach().clone().requires_grad_()
        hidden = torch.tanh(F.embedding(ids, weight))
        if chunked:
            head = Head(lambda x: F.linear(x, weight), (weight,))
            loss = logit_losses(hidden, head, case.teacher_hidden, case.teacher_head, case.targets, chunk_tokens=4).loss
        else:
            kept = case.targets != IGNORE
            ours = F.log_softmax(F.linear(hidden, weight)[kept], -1)
            theirs = F.log_softmax(case.teacher_head(case.teacher_hidden)[kept], -1)
            loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        loss.backward()
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-9, atol=1e-12)


def test_frozen_parameters_and_no_grad():
    case = Case()
    case.weight.requires_grad_(False)
    loss = case.chunked().loss
    assert torch.autograd.grad(loss, case.bias)[0].abs().sum() > 0
    with torch.no_grad():
        assert not case.chunked().loss.requires_grad
        torch.testing.assert_close(case.chunked().loss, loss.detach())


def test_second_backward_is_refused():
    loss = Case().chunked().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_no_more_than_a_chunk_of_logits_exists():
    """Every call of either head sees at most `chunk_tokens` tokens."""
    case, seen = Case(), []

    class Counting(nn.Linear):
        def forward(self, hidden):
            seen.append(hidden.shape[:-1].numel())
            return super().forward(hidden)

    ours, theirs = Counting(NARROW, VOCAB).double(), Counting(WIDE, VOCAB).double()
    head = Head(ours, tuple(ours.parameters()))
    logit_losses(case.hidden, head, case.teacher_hidden, theirs, case.targets, chunk_tokens=4).loss.backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * int((case.targets != IGNORE).sum())


@pytest.mark.parametrize("top_k", [0, 5])
def test_students_of_one_teacher_learn_as_they_would_alone(top_k):
    """Whatever their widths, dtypes and weights, and with the teacher's head called once for each chunk."""
    case, seen = Case(), []
    narrow = case.hidden[..., :5].detach().float().requires_grad_(), case.weight[:, :5].detach().float()

    def teacher_head(hidden):
        seen.append(len(hidden))
        return case.teacher_head(hidden)

    def both(weight):
        wide = Student(case.hidden, Head(case.head, (case.weight, case.bias)), weight)
        return [wide, Student(narrow[0], Head(lambda x: F.linear(x, narrow[1]), (narrow[1],)), 1.0)]

    given = case.teacher_hidden, teacher_head, case.targets, Objective(top_k=top_k, ce_weight=0.2)
    alone = [logit_losses(one.hidden, one.head, *given, chunk_tokens=4) for one in both(1.0)]
    leaves, calls = [*case.leaves, narrow[0]], len(seen)
    expected = torch.autograd.grad(0.3 * alone[0].loss + alone[1].loss, leaves)
    found = shared_losses(both(0.3), *given, chunk_tokens=4)
    assert len(seen) - calls == calls // 2
    torch.testing.assert_close(found[0].loss, 0.3 * alone[0].loss)
    torch.testing.assert_close([one.divergence for one in found], [one.divergence for one in alone], rtol=1e-6, atol=0)
    ours = torch.autograd.grad(sum(one.loss for one in found), leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_a_registered_divergence_is_used():
    @divergence("test_total_variation")
    def total_variation(student, teacher):
        return (student.exp() - teacher.exp()).abs().sum(-1) / 2

    try:
        found = Case().chunked(Objective("test_total_variation"))
        assert 0 < found.loss < 1
    finally:
        del DIVERGENCES["test_total_variation"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"divergence": "kl"},
        {"temperature": 0.0},
        {"kd_weight": 0.0},
        {"ce_weight": -1.0},
        {"top_k": -1},
        {"top_k": 1, "remaining_mass": False},
    ],
)
def test_impossible_objectives_are_refused(wrong):
    with pytest.raises(NestlingError, match=next(iter(wrong)).replace("divergence", "loss")):
        Objective(**wrong)


def test_the_rest_of_a_distribution_has_the_gradient_of_its_sum():
    generator = torch.Generator().manual_seed(5)
    logits = (3 * torch.randn(4, VOCAB, generator=generator, dtype=torch.float64)).requires_grad_()
    indices = logits.detach().topk(6).indices
    weights = torch.randn(4, 7, generator=generator, dtype=torch.float64)

    def plainly(log_probs):
        others = torch.ones_like(log_probs).scatter(-1, indices, 0.0)
        return torch.cat([log_probs.gather(-1, indices), (log_probs.exp() * others).sum(-1, keepdim=True).log()], -1)

    found, expected = (form(logits.log_softmax(-1)) for form in (lambda value: at(value, indices, True), plainly))
    torch.testing.assert_close(found, expected)
    pulled, wanted = (torch.autograd.grad((weights * value).sum(), logits)[0] for value in (found, expected))
    torch.testing.assert_close(pulled, wanted)
    without = torch.autograd.grad((weights[:, :-1] * logits.log_softmax(-1).gather(-1, indices)).sum(), logits)[0]
    assert (without - wanted).abs().max() > 1e-2
    alone = torch.full((1, VOCAB), -torch.inf, dtype=torch.float64).index_fill(1, indices[0], 0.0).requires_grad_()
    kept = at(alone.log_softmax(-1), indices[:1], True)
    assert torch.autograd.grad(kept[:, :-1].sum(), alone)[0].isfinite().all()  # nothing is left for the rest
