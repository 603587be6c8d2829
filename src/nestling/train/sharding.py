"""Sharding (FSDP2), applied from outside to a learner that does not know of it.

Every decoder layer of student and teacher is gathered when it runs and freed after. What else the learner trains
(embeddings, last norm, head, projections) is one more group with the learner as its root: whole while its forward
pass runs, so the chunked losses see an ordinary head, whose gradient, summed over chunks, is reduced and scattered
once. A learner that reads weights elsewhere than in their layers (`gathers_all`) is one group altogether. The teacher
is a root of its own, freed when the learner's forward pass ends. Afterwards both models are whole again, in place.
A process may hold a model without its weights, which are then sent to it layer by layer (`sending`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nestling import processes
from nestling.anatomy import Anatomy
from nestling.errors import CheckpointError, NestlingError
from nestling.train.learner import Learner
from nestling.train.sending import send, some_lack_weights

SHARDS = "shards"


@contextmanager
def sharded(learner: Learner, device: torch.device, bf16: bool) -> Iterator[None]:
    """While open, the learner and its teacher are spread over all processes; afterwards they are whole, in place.

    A process that has a model without its weights has it so afterwards too.
    bf16: gather weights in bfloat16 and reduce gradients in float32. When the block fails, nothing is gathered, since
    the other processes may be gone; the models are then of no use. Raises `NestlingError` for a model that cannot be
    put together again from its config.
    """
    models = [model for model in (learner.student, learner.teacher) if model is not None]
    where = [model.device for model in models]
    processes.first(lambda: _check(models))
    with _group(device):
        _shard(learner, device, bf16)
        learner.is_sharded = True
        yield
        learner.is_sharded = False
        for model, before in zip(models, where, strict=True):
            _make_whole(model, before)
        _gather_rest(learner)


@contextmanager
def gathered(learner: Learner) -> Iterator[None]:
    """While open, the weights that the learner's own forward pass gathers are whole; every process must enter this."""
    if learner.is_sharded:
        learner.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        if learner.is_sharded:
            learner.reshard()  # type: ignore[operator]


# ---- apart


def _shard(learner: Learner, device: torch.device, bf16: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy()
    models = [model for model in (learner.student, learner.teacher) if model is not None]
    arrive = send if some_lack_weights(models) else lambda module: None
    trained = [model for model in models if any(model is module for module in learner.modules())]
    layers = [(layer, _stays_wide(model, layer)) for model in trained for layer in Anatomy.of(model).layers(model)]
    if learner.gathers_all:
        bf16 = bf16 and not any(wide for _, wide in layers)
    else:
        for layer, wide in layers:
            arrive(layer)
            fully_shard(layer, mesh=mesh, mp_policy=half if bf16 and not wide else exact)
    arrive(learner)
    fully_shard(learner, mesh=mesh, mp_policy=half if bf16 else exact, ignored_params=_scalars(learner, device))
    if len(trained) < len(models):  # the teacher is not corrected along
        for layer in Anatomy.of(models[-1]).layers(models[-1]):
            arrive(layer)
            fully_shard(layer, mesh=mesh)
        arrive(learner.taught)
        root = fully_shard(learner.taught, mesh=mesh)
        learner.register_forward_hook(lambda *_: root.reshard())


def _scalars(learner: Learner, device: torch.device) -> set[nn.Parameter]:
    """Parameters without a dimension cannot be cut: `Trainer` keeps them equal in all processes."""
    scalars = {parameter for parameter in learner.parameters() if parameter.dim() == 0}
    for parameter in scalars:
        parameter.data = parameter.data.to(device)
    return scalars


def _stays_wide(model: PreTrainedModel, layer: nn.Module) -> bool:
    """Whether a layer has weights that transformers keeps in float32: all of it is then gathered so."""
    fields = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    kept = {name for field in fields for name in getattr(model, field, None) or ()}
    return any(part in kept for name, _ in layer.named_parameters() for part in name.split("."))


@contextmanager
def _group(device: torch.device) -> Iterator[None]:
    """A process that was started alone is a group of one."""
    if dist.is_initialized():
        yield
        return
    backend = "gloo" if device.type == "cpu" else None
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- whole


def _check(models: list[PreTrainedModel]) -> None:
    """Raise `NestlingError` unless the configs alone say what the models are made of."""
    for model in models:
        if _tensors(_skeleton(model)) != _tensors(model):
            raise NestlingError(
                f"this {model.config.model_type} model has other tensors than its config describes, so it cannot be "
                f"put together again after sharding: train it with fsdp off"
            )


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config)


def _tensors(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _make_whole(model: PreTrainedModel, device: torch.device) -> None:
    """Give the model modules that are not sharded, with its weights as they are now."""
    whole = _skeleton(model)
    state = {name: _full(tensor).to(device) for name, tensor in model.named_parameters()}
    whole.load_state_dict(state, strict=False, assign=True)
    for name, buffer in model.named_buffers():
        owner, _, own = name.rpartition(".")
        persistent = own not in whole.get_submodule(owner)._non_persistent_buffers_set
        whole.get_submodule(owner).register_buffer(own, _full(buffer).to(device), persistent)
    whole.tie_weights()
    whole.train(model.training)
    for name, trained in model.named_parameters():
        whole.get_parameter(name).requires_grad_(trained.requires_grad)
    for name, child in whole.named_children():
        setattr(model, name, child)


def _gather_rest(learner: Learner) -> None:
    """Make whole what the learner trains beside the student."""
    for module in learner.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                setattr(module, name, nn.Parameter(_full(parameter)))


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- checkpoints


def save_shards(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Every process writes its own part of weights and optimizer as safetensors; all must call this."""
    from torch.distributed import checkpoint

    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    state = _weights(learner) | _tensors_of("optimizer", _optimizer_state(learner, optimizer))
    writer = checkpoint.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    try:
        checkpoint.save(state, storage_writer=writer)
    except checkpoint.CheckpointException as error:  # no Exception: nobody else would take it for one
        raise OSError(f"a process cannot write its shards: {error.failures}") from error


def load_weights(folder: Path, learner: Learner) -> None:
    """Read the weights back, whatever the number of processes that wrote them."""
    _load(folder, _weights(learner))


def load_optimizer(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Read the optimizer's state back."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = _optimizer_state(learner, optimizer)
    _load(folder, _tensors_of("optimizer", state))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(learner, optimizer, state, options=options)


def _load(folder: Path, state: dict[str, Tensor]) -> None:
    from torch.distributed import checkpoint

    try:
        checkpoint.load(state, storage_reader=checkpoint.HuggingFaceStorageReader(str(folder / SHARDS)))
    except (checkpoint.CheckpointException, OSError) as error:
        raise CheckpointError(f"the shards in '{folder}' cannot be read: remove that checkpoint") from error


def _weights(learner: Learner) -> dict[str, Tensor]:
    named = dict(learner.named_parameters())
    extra = {name: t for name, t in learner.state_dict().items() if name not in named and not isinstance(t, DTensor)}
    return _tensors_of("weights", named | extra)


def _optimizer_state(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by the names of parameters, made if there is none yet."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(learner, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


def _tensors_of(what: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in it, sharing its memory; the file format has none without a dimension."""
    tensors = {f"{what}.{name}": value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    return {name: value.reshape(1) if value.dim() == 0 else value for name, value in tensors.items()}
