"""Soft masks at a hard choice are the slice, for every architecture; between hard choices they are smooth."""

import pytest
import torch

from nestling.elastic.likely import Likely
from nestling.elastic.soft import softly
from nestling.elastic.soft_norm import _size_by_size, rms_eps, soft_norm
from nestling.surgery import prune
from tests.elastic.toy import one_hot, random_logits, sorted_parent, space_of
from tests.models import VARIANTS, in_float64, logits, token_batches

IDS = token_batches(1)[0]["input_ids"]


# Sizes of these are bound to each other, so that one drawn for each axis and layer is no model.
BOUND = ("mamba2", "bamba", "granitemoehybrid", "falcon_h1", "olmoe")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith(BOUND)])
def test_a_hard_choice_is_the_cut_model(variant):
    model, ranking = sorted_parent(variant)
    space = space_of(model, ranking)
    for seed in (1,):
        chances, sizes = one_hot(space, seed)
        child = prune(model, ranking, space.shape(sizes))
        with in_float64():
            expected = logits(child, IDS)
            with softly(model, space, chances):
                found = model(input_ids=IDS).logits
        close = 1e-10 if space.anatomy.architecture.routed is None else 2e-6  # routers compute in float32
        torch.testing.assert_close(found, expected, atol=close, rtol=close)
    found.sum().backward()
    chosen = {field for field, axis in space.anatomy.axes.items() if axis.active}  # experts: no mean, no gradient
    assert all(torch.isfinite(value.grad).all() for field, value in chances.items() if field not in chosen)
    torch.testing.assert_close(logits(model, IDS), logits(model, IDS))  # no hook is left
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("variant", ["llama", "nemotron_h"])
def test_gradients_of_the_chances_are_those_of_finite_differences(variant):
    model, ranking = sorted_parent(variant)
    space = space_of(model, ranking, per_layer=())
    chances = {f: torch.softmax(z, -1).requires_grad_() for f, z in random_logits(space, 0, 1.0).items()}

    def loss() -> torch.Tensor:
        with softly(model, space, chances):
            return model(input_ids=IDS, labels=IDS).loss

    with in_float64():
        loss().backward()
        for field, value in chances.items():
            if field in ("mamba_num_heads", "mamba_head_dim"):  # the eps of a norm inside a kernel is a plain number
                continue
            with torch.no_grad():
                value[0, 1] += 1e-5
                above = loss()
                value[0, 1] -= 2e-5
                below = loss()
                value[0, 1] += 1e-5
            slope = ((above - below) / 2e-5).item()
            assert value.grad[0, 1].item() == pytest.approx(slope, rel=1e-3, abs=1e-6), field


def test_without_norms_over_kept_channels_the_mask_would_be_wrong(monkeypatch):
    """Negative control: zeros that still count in a norm's mean."""
    model, ranking = sorted_parent("qwen3")
    space = space_of(model, ranking)
    chances, sizes = next(found for seed in range(9) if int((found := one_hot(space, seed))[1]["hidden_size"]) < 80)
    expected = logits(prune(model, ranking, space.shape(sizes)), IDS)
    monkeypatch.setattr("nestling.elastic.soft.is_norm", lambda module, specs: False)
    with torch.no_grad(), softly(model, space, chances):
        found = model(input_ids=IDS).logits
    assert (found - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "nemotron"])
def test_all_sizes_of_a_norm_at_once_are_those_one_by_one(variant):
    """Where a norm is a root mean square; the norms of Nemotron take the mean off and are computed one by one."""
    model, ranking = sorted_parent(variant)
    space = space_of(model, ranking, per_layer=())
    chances = {f: torch.softmax(z, -1) for f, z in random_logits(space, 0, 1.0).items()}
    likely = Likely(space, chances, next(model.parameters()))
    name, spec = next(
        (n, s) for n, s in space.anatomy.tensors.items() if "norm" in n and "hidden" in s.letters and s.layer == 1
    )
    norm = model.get_submodule(name.removesuffix(".weight"))
    assert (rms_eps(norm) is None) == (variant == "nemotron")
    hidden = 1 + torch.randn(2, 3, space.anatomy.sizes(None)["hidden"], dtype=torch.float64)
    with in_float64():
        output = norm(hidden)
        mask = likely.along(spec.layout[0], 1, frozenset({"hidden"}))
        expected = _size_by_size(["hidden"], spec, likely)(norm, (hidden,), output)
        found = soft_norm(norm, spec, likely)(norm, (hidden,), output) * mask
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
