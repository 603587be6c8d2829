"""Every metric on every architecture against the formula of its paper, written out over stored readings in float64."""

import pytest
import torch
import torch.nn.functional as F

from nestling.anatomy import Anatomy
from nestling.ranking import METRICS, metric, rank
from tests.models import HYBRID_MOE, MOE, SHARED, VARIANTS, tiny, token_batches

# Routed experts are held against a naive loop in test_experts.py, shared layers against copies in test_shared.py.
SHIPPED = sorted(set(METRICS) - {"random", "reap", "frequency", "gate"})
UNROUTED = [name for name in VARIANTS if name not in (*MOE, *HYBRID_MOE, *SHARED)]


@pytest.fixture
def probe():
    """A metric that keeps all it is shown, gradients too."""
    kept: dict = {}

    @metric("probe", gradients=True)
    def keep(read):
        key = (read.weight.data_ptr(), read.weight.shape, read.weight.stride())
        kept.setdefault(key, (read.weight.detach().double(), []))[1].append(read)
        return read.activation[..., 0]

    yield kept
    del METRICS["probe"]


def some(units):
    """Loops are slow: six units of many."""
    return range(0, units, max(1, units // 6))


def formula(name, weight, inputs, outputs, gradients):
    """Scores of some units from weight `[out, units, inside]`, and `[rows, seq, ...]` of everything else."""
    rows, _, units, inside = inputs.shape
    scores = []
    for unit in some(units):
        w, a, g = weight[:, unit], inputs[:, :, unit], gradients[:, :, unit]
        size = outputs.norm(dim=-1)
        flat = a.reshape(-1, inside)
        if name == "magnitude":
            score = (w**2).sum().sqrt()
        elif name == "wanda":
            score = sum(w[:, j].abs().sum() * (flat[:, j] ** 2).sum().sqrt() for j in range(inside))
        elif name == "flap":
            score = sum((w[:, j] ** 2).sum() * ((flat[:, j] - flat[:, j].mean()) ** 2).mean() for j in range(inside))
        elif name == "taylor":
            score = sum((a[row] * g[row]).sum().abs() for row in range(rows)) / rows
        elif name == "activation_channels":
            score = (a.abs().mean(1) ** 2).sum().sqrt()
        elif name == "activation":
            score = (((a**2).sum(-1).sqrt().mean(1)) ** 2).sum().sqrt()
        elif name == "relative":
            score = ((a**2).sum(-1).sqrt() / size).pow(2).sum().sqrt()
        else:
            assert name == "contribution"
            score = ((a @ w.T).norm(dim=-1) / size).pow(2).sum().sqrt()
        scores.append(score)
    return torch.stack(scores)


def naive(kept, name):
    """Scores of each place, in the order in which the sweep met them."""
    return [
        formula(
            name,
            weight,
            torch.cat([read.activation.double() for read in reads]),
            torch.cat([read.output.double() for read in reads]),
            torch.cat([read.gradient.double() for read in reads]),
        )
        for weight, reads in kept.values()
    ]


@pytest.mark.parametrize("variant", UNROUTED)
def test_every_metric_is_its_formula(variant, probe):
    """One axis at a time, so that each kept reading is one place of it."""
    model, batches = tiny(variant), token_batches(2, 2, 5)
    anatomy = Anatomy.of(model)
    scores = {name: rank(model, batches, name).scores for name in SHIPPED}
    for field, axis in anatomy.axes.items():
        probe.clear()
        rank(model, batches, dict.fromkeys(anatomy.axes, "magnitude") | {field: "probe"})
        for name in SHIPPED:
            found = scores[name][field]
            places = naive(probe, name)
            if axis.scope == "model":
                expected = torch.stack(places).sum(0)
                torch.testing.assert_close(found[list(some(len(found)))], expected, rtol=5e-5, atol=1e-9)
                continue
            together = torch.cat([part[list(some(len(part)))] for part in found if len(part)])
            per_layer = len(places) // sum(1 for part in found if len(part))
            # Going backward meets places from the last to the first.
            groups = [torch.stack(places[i : i + per_layer]) for i in range(0, len(places), per_layer)][::-1]
            expected = torch.cat([g.prod(0) if axis.combine == "product" else g.sum(0) for g in groups])
            torch.testing.assert_close(together, expected, rtol=5e-5, atol=1e-9)


@pytest.mark.parametrize("variant", [name for name in UNROUTED if not name.startswith("mamba2")])
def test_taylor_is_the_change_that_the_weights_gradients_foretell(variant):
    """|W_u . dL/dW_u| of LLM-Pruner, from a plain backward pass through the whole model, row by row."""
    model, batches = tiny(variant), token_batches(2, 2, 6)
    found = rank(model, batches, "taylor").scores
    rows = torch.cat([batch["input_ids"] for batch in batches])
    for field, axis in Anatomy.of(model).axes.items():
        endings = [place for place in axis.scored_at if place.endswith(("down_proj", "o_proj", "output_linear"))]
        if len(axis.scored_at) != 1 or not endings:
            continue  # read by several modules, or written
        weights = [p for name, p in model.named_parameters() if name.endswith(f"{endings[0]}.weight")]
        scored = [scores for scores in found[field] if len(scores)]
        totals = [torch.zeros_like(scores) for scores in scored]
        for row in rows:
            logits = model(input_ids=row[None]).logits[0, :-1]
            gradients = torch.autograd.grad(F.cross_entropy(logits, row[1:], reduction="sum"), weights)
            for total, weight, gradient in zip(totals, weights, gradients, strict=True):
                total += (weight * gradient).sum(0).detach().view(len(total), -1).sum(-1).abs() / len(rows)
        for scores, total in zip(scored, totals, strict=True):
            torch.testing.assert_close(scores, total, rtol=1e-4, atol=1e-9)


def test_gradients_leave_the_model_as_it_was():
    model = tiny("llama-tied")
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    rank(model, token_batches(1), "taylor")
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(IndexError):
        rank(model, [{"input_ids": torch.full((1, 4), 10**6)}], "taylor")
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize("name", SHIPPED)
def test_padding_and_the_size_of_batches_do_not_matter(name):
    model, rows = tiny("llama"), [torch.randint(3, 97, (length,)) for length in (9, 4, 6)]
    alone = rank(model, [{"input_ids": row[None]} for row in rows], name)
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    together = rank(model, [{"input_ids": ids, "attention_mask": mask}], name)
    for field, scores in alone.scores.items():
        torch.testing.assert_close(together.scores[field], scores, rtol=1e-4, atol=1e-6)


def test_chance_is_the_seeds_and_not_the_texts():
    model = tiny("llama")
    torch.manual_seed(5)
    one, other = rank(model, token_batches(1), "random"), rank(model, token_batches(3, seed=9), "random")
    assert one.fingerprint == other.fingerprint
    assert len({scores.sum().item() for scores in one.scores["intermediate_size"]}) == 4
    torch.manual_seed(6)
    assert rank(model, token_batches(1), "random").fingerprint != one.fingerprint


def test_metrics_disagree():
    model, batches = tiny("llama"), token_batches(2, 2, 8)
    prints = {name: rank(model, batches, name).fingerprint for name in [*SHIPPED, "random"]}
    assert len(set(prints.values())) == len(prints)
