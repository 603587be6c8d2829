"""Declarations against real models: every tensor described, nothing guessed."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from nestling.anatomy import ARCHITECTURES, Anatomy
from nestling.errors import UnsupportedArchitecture
from tests.models import VARIANTS, cuts, tiny


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_described_from_the_model_and_from_its_config(variant):
    model = tiny(variant)
    anatomy = Anatomy.of(model)
    assert set(anatomy.tensors) == set(model.state_dict())
    assert set(Anatomy.of(model.config).tensors) == set(anatomy.tensors)
    assert set(anatomy.fields) == {field for shape in cuts(variant) for field in shape}


def test_every_declared_architecture_has_a_tiny_model():
    assert set(ARCHITECTURES) == {model_type for model_type, _ in VARIANTS.values()}


def test_an_undeclared_architecture_is_named():
    with pytest.raises(UnsupportedArchitecture, match="'gpt2' is not described"):
        Anatomy.of(GPT2Config())


def test_an_undeclared_tensor_is_named():
    model = tiny("llama")
    model.model.layers[1].mlp.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsupportedArchitecture, match=r"model\.layers\.1\.mlp\.extra"):
        Anatomy.of(model)


def test_a_tensor_of_another_size_is_refused():
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(43, 48))
    with pytest.raises(UnsupportedArchitecture, match="up_proj"):
        Anatomy.of(model)
