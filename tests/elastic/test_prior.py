"""What a router knows before it learns: losses that were measured, and the sizes that they make best."""

import dataclasses
import itertools

import pytest
import torch

from nestling.anatomy import Anatomy
from nestling.elastic.bill import Bill
from nestling.elastic.harden import TOLERANCE, Wishes, harden
from nestling.elastic.prior import even, measured, probed, probed_once
from nestling.elastic.settings import ElasticSettings
from nestling.elastic.target import Target
from nestling.elastic.train import make_plan
from nestling.shape import allows
from nestling.surgery import prune
from tests.elastic.toy import random_logits, sorted_parent, space_of
from tests.models import logits, token_batches


@pytest.mark.parametrize("variant", ["llama", "nemotron_h"])
def test_probed_losses_are_those_of_models_cut_in_one_row(variant):
    """Against the divergence of children that `prune` makes; without a cut there is no loss, and more loses no less."""
    model, ranking = sorted_parent(variant)
    space, batches = space_of(model, ranking, ()), token_batches(2, 2, 12)
    found = probed(model, space, batches)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    wanted = logits(model, ids).log_softmax(-1)
    for field, row, choice in measured(space):
        chosen = space.largest()
        chosen[field][row] = int(space.knobs[field].sizes[row, choice])
        child = logits(prune(model, ranking, space.shape(chosen)), ids).log_softmax(-1)
        loss = (wanted.exp() * (wanted - child)).sum(-1).mean().item()
        last = choice == space.knobs[field].sizes.shape[1] - 1
        assert found[field][row, choice].item() >= loss - 1e-6
        if not last:  # those before it may have lost more, which is carried on
            assert found[field][row, choice].item() == pytest.approx(loss, rel=1e-3, abs=1e-6) or (
                found[field][row, choice] == found[field][row, choice - 1]
            )
    assert all((value[:, 0] == 0).all() and (value.diff(dim=-1) >= 0).all() for value in found.values())


def test_sizes_are_no_worse_than_the_best_listed_ones_on_the_budget():
    """Against all of them; wishes that are turned round give what is worse."""
    model, ranking = sorted_parent("llama", hidden_size=96, intermediate_size=200)
    space = space_of(model, ranking, ())
    target = Target.of("0.6x", Bill(Anatomy.of(model), 64)).on(space)
    for seed in range(2):
        losses = {f: value.abs().cumsum(-1) for f, value in random_logits(space, seed).items()}
        losses = {f: value - value[:, :1] for f, value in losses.items()}
        wishes = Wishes.of(space, {f: -value for f, value in losses.items()})
        listed = []
        for picked in itertools.product(*(range(knob.sizes.shape[1]) for knob in space.knobs.values())):
            sizes = {f: k.sizes[:, i].long() for (f, k), i in zip(space.knobs.items(), picked, strict=True)}
            if abs(target.of_sizes(space, sizes) - 1) <= TOLERANCE and allows(space.anatomy, space.shape(sizes)):
                listed.append(wishes(sizes))
        found = harden(space, target, {f: -value for f, value in losses.items()})
        assert wishes(found) >= max(listed)
        assert wishes(harden(space, target, losses)) < wishes(found)


def test_even_losses_ask_for_the_same_part_of_every_axis():
    model, ranking = sorted_parent("llama", hidden_size=96, intermediate_size=200)
    space = space_of(model, ranking, ())
    target = Target.of("0.5x", Bill(Anatomy.of(model), 64)).on(space)
    sizes = harden(space, target, {f: -value for f, value in even(space, target).items()})
    parts = [int(sizes[f]) / int(space.largest()[f]) for f in ("hidden_size", "intermediate_size")]
    assert abs(parts[0] - parts[1]) < 0.2


def test_probes_in_a_folder_are_taken_from_the_same_run_only(tmp_path, monkeypatch):
    """Not those of other settings, text or weights, nor of a file that is damaged."""
    (model, _), (other, _) = sorted_parent("llama"), sorted_parent("llama", seed=1)
    settings = ElasticSettings(axes="intermediate_size", steps=4)
    made: list[int] = []
    monkeypatch.setattr("nestling.elastic.prior.probed", lambda *given: made.append(1) or probed(*given))

    def losses(model=model, text=0, settings=settings):
        plan = make_plan(Anatomy.of(model), range(4), ["0.9x"], settings)
        before, batches = len(made), [token_batches(2, 1, 8)[text]]
        found = probed_once(model, plan.space, batches, settings, tmp_path, True)
        return found["intermediate_size"], len(made) - before

    first, again = losses(), losses()
    assert torch.equal(first[0], again[0])
    assert (first[1], again[1]) == (1, 0)
    assert losses(settings=dataclasses.replace(settings, log_every=9, save_every=7))[1] == 0
    for changed in ({"settings": dataclasses.replace(settings, seed=1)}, {"text": 1}, {"model": other}):
        assert (losses(**changed)[1], losses(**changed)[1]) == (1, 0)
    whole = (tmp_path / "probes.safetensors").read_bytes()
    (tmp_path / "probes.safetensors").write_bytes(whole[:-9])
    assert losses(model=other)[1] == 1
