"""Two processes: training on shards, and experts parted between them, give what one process gives."""

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from nestling import processes
from nestling.experts import NAME
from nestling.moe import MixtureSettings, train
from tests.models import tiny, token_batches
from tests.several import together

IDS = token_batches(1, 2, 9)[0]["input_ids"]


def trained(**overrides):
    model = tiny("qwen3_moe", dtype=torch.float32)
    settings = {"steps": 3, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "save_every": 0}
    train(model, token_batches(3, 4, 11), None, MixtureSettings(**(settings | overrides)))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_sharded_training_learns_the_same_weights(tmp_path):
    """Losses of the routers included: loads are counted over both processes."""
    expected = trained(balance=0.5, z_loss=0.1)
    how = {"fsdp": True, "micro_batch_size": 2, "balance": 0.5, "z_loss": 0.1}
    for found in together(2, tmp_path, lambda: trained(**how)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


def parted(folder):
    """Loss and gradients of one layer's router and experts, from a row and half of the experts in each process."""
    store = processes.start()
    how = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=how, experts_implementation=NAME)
    own = IDS[processes.number()][None]
    loss = model(input_ids=own, labels=own).loss
    loss.backward()
    block = model.model.layers[0].mlp
    down, router = block.experts.down_proj.grad, block.gate.weight.grad
    whole = down.full_tensor() if hasattr(down, "full_tensor") else down
    router = router.full_tensor() if hasattr(router, "full_tensor") else router
    del store
    return float(processes.summed(loss.detach())) / 2, whole, router


def test_experts_parted_between_processes_give_the_same_loss_and_gradients(tmp_path):
    model = tiny("qwen3_moe", dtype=torch.float32, mlp_only_layers=[])
    model.save_pretrained(tmp_path / "m")
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    block = model.model.layers[0].mlp
    for found, down, router in together(2, tmp_path, parted, tmp_path / "m"):
        torch.testing.assert_close(found, loss.item(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(down, block.experts.down_proj.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(router, block.gate.weight.grad, rtol=1e-4, atol=1e-6)
