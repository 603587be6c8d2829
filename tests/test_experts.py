"""Fast experts against a loop over tokens and slots in float64: values, every gradient, recomputation, odd routings."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nestling import experts
from nestling.experts import NAME, Experts, experts_forward, plan, use_fast_experts
from nestling.moe import routed_modules
from tests.models import tiny

HIDDEN, WIDTH, EXPERTS = 6, 5, 7


class Module(nn.Module):
    """The attributes that transformers gives its experts modules."""

    has_post_expert_norm = _is_expert_parallel = False
    _apply_gate = experts.stock._default_apply_gate

    def __init__(self, has_gate=True, has_bias=False, is_transposed=False, act=None):
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.num_experts = has_gate, has_bias, is_transposed, EXPERTS
        self.act_fn = act or nn.SiLU()
        name, inner = ("gate_up_proj", 2 * WIDTH) if has_gate else ("up_proj", WIDTH)
        up, down = torch.randn(EXPERTS, inner, HIDDEN), torch.randn(EXPERTS, HIDDEN, WIDTH)
        if is_transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        self.register_parameter(name, nn.Parameter(up))
        self.down_proj = nn.Parameter(down)
        if has_bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, inner)))
            self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.double()


def naive(module, hidden, index, weights):
    """Token by token, slot by slot."""
    up = module.gate_up_proj if module.has_gate else module.up_proj
    outputs = []
    for token in range(len(hidden)):
        total = 0 * hidden[token]
        for slot, expert in enumerate(index[token].tolist()):
            if expert >= EXPERTS:
                continue
            inner = hidden[token] @ up[expert] if module.is_transposed else up[expert] @ hidden[token]
            if module.has_bias:
                inner = inner + module.gate_up_proj_bias[expert]
            neurons = module.act_fn(inner[:WIDTH]) * inner[WIDTH:] if module.has_gate else module.act_fn(inner)
            down = module.down_proj[expert]
            output = neurons @ down if module.is_transposed else down @ neurons
            if module.has_bias:
                output = output + module.down_proj_bias[expert]
            total = total + weights[token, slot] * output
        outputs.append(total)
    return torch.stack(outputs)


ROUTINGS = {
    "even": lambda: torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(40)]),
    "all to one": lambda: torch.full((30, 1), 4),
    "uneven": lambda: torch.stack([torch.randperm(3 if i % 3 else EXPERTS)[:2] for i in range(50)]),
    "few": lambda: torch.tensor([[6, 0], [0, 2]]),
    "one token": lambda: torch.tensor([[5, 1]]),
    "some nowhere": lambda: torch.randint(0, EXPERTS + 1, (20, 2)),
    "all nowhere": lambda: torch.full((4, 2), EXPERTS),
}
KINDS = {
    "gated": {},
    "gelu": {"act": nn.GELU()},
    "no gate": {"has_gate": False, "act": nn.ReLU()},
    "transposed, biases": {"has_bias": True, "is_transposed": True},
}


def grads(function, module, hidden, index, weights):
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    output = function(module, hidden, index, weights)
    leaves = [hidden, weights, *module.parameters()]
    probe = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    return output.detach(), torch.autograd.grad(
        (output * probe).sum(), leaves, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("at_once", [1, experts.AT_ONCE])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_values_and_gradients_are_those_of_a_loop(kind, routing, at_once, monkeypatch):
    monkeypatch.setattr(experts, "AT_ONCE", at_once)
    module, index = Module(**KINDS[kind]), ROUTINGS[routing]()
    hidden = torch.randn(len(index), HIDDEN, dtype=torch.float64)
    weights = torch.rand(index.shape, dtype=torch.float64)
    expected = grads(naive, module, hidden, index, weights)
    found = grads(experts_forward, module, hidden, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(experts_forward(module, hidden, index, weights), expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_on_larger_matrices_have_the_same_gradients(kind):
    """As members of an elastic family hold them."""
    module, index = Module(**KINDS[kind]), ROUTINGS["uneven"]()
    hidden, weights = torch.randn(len(index), HIDDEN).double(), torch.rand(index.shape).double()
    expected = grads(experts_forward, module, hidden, index, weights)
    for name, parameter in list(module.named_parameters()):
        larger = torch.nn.functional.pad(parameter.detach(), (0, 2, 0, 3))
        window = larger[:, : parameter.shape[1], : parameter.shape[2]] if parameter.dim() == 3 else parameter.detach()
        setattr(module, name, nn.Parameter(window))
        assert parameter.dim() < 3 or not getattr(module, name).is_contiguous()
    torch.testing.assert_close(grads(experts_forward, module, hidden, index, weights), expected, rtol=1e-12, atol=1e-12)


def test_a_wrong_gradient_would_show():
    module, index = Module(), ROUTINGS["even"]()
    hidden, weights = torch.randn(40, HIDDEN).double(), torch.rand(40, 3).double()
    expected = grads(naive, module, hidden, index, weights)[1]
    wrong = grads(lambda *a: naive(a[0], a[1], a[2], a[3].detach() + 0 * a[3]), module, hidden, index, weights)[1]
    assert not torch.allclose(wrong[1], expected[1])


def test_gradcheck():
    module, index = Module(), torch.tensor([[0, 3], [3, 6], [1, 3]])
    inputs = (torch.randn(3, HIDDEN).double().requires_grad_(), torch.rand(3, 2).double().requires_grad_())
    parameters = (module.gate_up_proj, module.down_proj)

    def function(hidden, weights, up, down):
        return experts._Compute.apply(
            hidden, weights, index, up.transpose(1, 2), down.transpose(1, 2), None, None, None
        )

    assert torch.autograd.gradcheck(function, (*inputs, *parameters))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_and_double_use_give_the_same_gradients(reentrant):
    module, index = Module(), ROUTINGS["even"]()
    hidden, weights = torch.randn(40, HIDDEN).double(), torch.rand(40, 3).double()

    def twice(function, m, h, i, w):
        return function(m, torch.tanh(function(m, h, i, w)), i.flip(0), w)

    def recomputed(m, h, i, w):
        return checkpoint(lambda *a: twice(experts_forward, *a), m, h, i, w, use_reentrant=reentrant)

    expected = grads(lambda *a: twice(naive, *a), module, hidden, index, weights)
    # a reentrant checkpoint takes gradients by backward() alone
    h, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    output = recomputed(module, h, index, w)
    (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
    found = [h.grad, w.grad, *(p.grad for p in module.parameters())]
    torch.testing.assert_close(found, list(expected[1]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_slot_has_a_row_of_its_own(routing):
    index = ROUTINGS[routing]()
    layout, row_of_slot, token_of_row = plan(index, EXPERTS)
    real = index < EXPERTS
    rows = row_of_slot[real]
    assert len(set(rows.tolist())) == real.sum() == len(rows)
    tokens = torch.arange(len(index))[:, None].expand_as(index)
    assert torch.equal(token_of_row[rows], tokens[real])
    if (~real).any():
        assert set(row_of_slot[~real].tolist()) == {layout.rows}
    expert_of_row, row = {}, 0
    for pair, size in zip(layout.pairs, layout.sizes, strict=True):
        members = list(pair)
        expert_of_row |= {row + i: members[i * len(members) // size] for i in range(size)}
        row += size
    assert [expert_of_row[row] for row in rows.tolist()] == index[real].tolist()
    assert sorted(e for pair in layout.pairs for e in pair) == sorted(set(index[real].tolist()))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("most", [1, 20, 10**6])
def test_groups_have_every_row_once_and_few_at_a_time(routing, most):
    layout = plan(ROUTINGS[routing](), EXPERTS)[0]
    groups = list(layout.groups(most))
    assert [row for at, _ in groups for row in range(at.start, at.stop)] == list(range(layout.rows))
    assert tuple(pair for _, group in groups for pair in group.pairs) == layout.pairs
    assert all(group.rows == at.stop - at.start for at, group in groups)
    assert all(group.rows <= most or len(group.pairs) == 1 for _, group in groups)
    assert most > 1 or len(groups) == len(layout.pairs)


def test_outputs_in_bfloat16_are_added_up_in_float32(monkeypatch):
    """Each expert adds one to what is 256 already, which bfloat16 does not notice."""
    monkeypatch.setattr(experts, "AT_ONCE", 1)
    module = Module(has_gate=False, act=nn.Identity())
    for parameter, value in ((module.up_proj, 1 / HIDDEN), (module.down_proj, 1 / WIDTH)):
        parameter.data.fill_(value)
    index, ones = torch.arange(EXPERTS)[None].expand(2, -1), torch.ones(2, HIDDEN)
    weights = torch.tensor([256.0] + [1.0] * (EXPERTS - 1)).expand(2, -1)
    with torch.no_grad():
        found = experts_forward(module.bfloat16(), ones.bfloat16(), index, weights.bfloat16())
    torch.testing.assert_close(found.float(), torch.full((2, HIDDEN), 262.0), rtol=2**-8, atol=0)
    assert torch.tensor(256.0).bfloat16() + 1 == 256


def test_padding_is_a_small_part_of_any_work():
    torch.manual_seed(0)
    uneven = torch.distributions.Categorical(torch.arange(1.0, 65.0)).sample((1024, 8))
    for index in (torch.stack([torch.randperm(64)[:8] for _ in range(1024)]), uneven):
        assert plan(index, 64)[0].rows <= index.numel() + torch.bincount(index.flatten()).max()


def test_gradients_lie_in_memory_as_their_parameters():
    for transposed in (False, True):
        module, index = Module(is_transposed=transposed), ROUTINGS["even"]()
        hidden = torch.randn(40, HIDDEN).double()
        experts_forward(module, hidden, index, torch.rand(40, 3).double()).sum().backward()
        assert all(p.grad.is_contiguous() for p in module.parameters())


@pytest.mark.parametrize("routing", ["even", "some nowhere", "all nowhere"])
def test_huge_pages_change_nothing(routing, monkeypatch):
    module, index = Module(), ROUTINGS[routing]()
    hidden, weights = torch.randn(len(index), HIDDEN).double(), torch.rand(index.shape).double()
    expected = grads(experts_forward, module, hidden, index, weights)
    monkeypatch.setattr(experts, "MAPPED", 1)
    assert experts._empty(hidden, 3, 5).shape == (3, 5)
    found = grads(experts_forward, module, hidden, index, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_stock_experts_take_the_short_way():
    for variant in ("qwen3_moe", "mixtral", "olmoe"):
        experts = next(routed_modules(tiny(variant)))[2]
        assert Experts.of(experts).activate is None


def test_what_is_kept_for_the_backward_pass_is_the_up_projection_and_little_else():
    module, index = Module(), torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(400)])
    hidden, weights = torch.randn(400, HIDDEN).double().requires_grad_(), torch.rand(400, 3).double()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts_forward(module, hidden, index, weights)
    own = {p.data_ptr() for p in module.parameters()} | {hidden.data_ptr(), weights.data_ptr()}
    numbers = sum(t.numel() for t in kept if t.data_ptr() not in own and t.is_floating_point())
    assert numbers <= 1.25 * index.numel() * 2 * WIDTH


def test_bfloat16_and_autocast_stay_near_float64():
    module, index = Module(), ROUTINGS["even"]()
    hidden, weights = torch.randn(40, HIDDEN).double(), torch.rand(40, 3).double()
    expected = experts_forward(module, hidden, index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        close = experts_forward(module.float(), hidden.float(), index, weights.float())
    assert close.dtype == torch.bfloat16
    torch.testing.assert_close(close.double(), expected, rtol=0.1, atol=0.5)


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_biases_in_bfloat16_are_summed_in_float32(weights_dtype):
    """In bfloat16 a sum of ones ends at 256: a sum row by row would lose most of it."""
    module = Module(has_bias=True, is_transposed=True)
    index, hidden = torch.arange(4000)[:, None] % 2, torch.rand(4000, HIDDEN).double()
    weights = 0.5 + torch.rand(index.shape).double()
    expected = grads(experts_forward, module, hidden, index, weights)[1]
    module.bfloat16()
    found = grads(experts_forward, module, hidden.bfloat16(), index, weights.to(weights_dtype))[1]
    for name, close, exact in zip(dict(module.named_parameters()), found[2:], expected[2:], strict=True):
        assert (close.double() - exact).norm() < 0.02 * exact.norm(), name
    serial = torch.zeros(1, dtype=torch.bfloat16).index_add_(0, torch.zeros(2000).int(), torch.ones(2000).bfloat16())
    assert serial.item() < 1900


def test_a_norm_after_each_expert_is_not_ours():
    module = Module()
    module.has_post_expert_norm = True
    assert Experts.of(module) is None


def test_a_model_computes_the_same_with_it():
    model = tiny("qwen3_moe", dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 9))
    model.set_experts_implementation("eager")
    expected = model(input_ids=ids).logits
    model.set_experts_implementation("grouped_mm")
    assert use_fast_experts(model).config._experts_implementation == NAME
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_implementation_that_was_chosen_stays():
    model = tiny("qwen3_moe")
    model.set_experts_implementation("eager")
    assert use_fast_experts(model).config._experts_implementation == "eager"
