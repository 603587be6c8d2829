"""Every metric and aggregation against a slow float64 reference that stores all activations through its own hooks."""

import itertools

import pytest
import torch

from nestling.errors import DataError, NestlingError
from nestling.ranking import METRICS, Reading, metric, rank
from nestling.ranking.aggregate import Aggregate
from nestling.surgery import prune
from tests.models import VOCAB, tiny, token_batches

KINDS = ("mean", "l2", "var")
# Rows are reduced in float32 by some aggregations, so the reference agrees to its rounding.
CLOSE = {"rtol": 2e-5, "atol": 1e-9}
# Modules that read the residual stream, written down by hand.
READERS = {
    "llama": ("self_attn.q_proj", "mlp.gate_proj"),
    "llama-mha": ("self_attn.q_proj", "mlp.gate_proj"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"),
}


def recorded(model, batches):
    """Module path -> its inputs and weight, `[rows, seq, in]` and `[out, in]`, in float64."""
    seen, hooks = {}, []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            seen[path] = []
            hooks.append(
                module.register_forward_hook(lambda m, args, out, path=path: seen[path].append(args[0].double()))
            )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {path: (torch.cat(rows), model.get_submodule(path).weight.detach().double()) for path, rows in seen.items()}


def magnitude(name, inputs, weight, units):
    """`[rows, seq, units]`, one unit at a time, each a run of neighbouring columns."""
    width = inputs.shape[-1] // units
    result = []
    for unit in range(units):
        columns = slice(unit * width, (unit + 1) * width)
        part = inputs[..., columns]
        if name == "contribution":
            result.append((part @ weight[:, columns].T).norm(dim=-1) / (inputs @ weight.T).norm(dim=-1))
        else:
            result.append(part[..., 0] if width == 1 else part.square().sum(-1).sqrt())
    return torch.stack(result, -1)


def reduced(kind, values):
    """Reduce the first dimension as the paper writes it."""
    count = len(values)
    if kind == "mean":
        return sum(value.abs() for value in values) / count
    if kind == "l2":
        return sum(value**2 for value in values) ** 0.5
    middle = sum(values) / count
    return sum((value - middle) ** 2 for value in values) / count


def scored(seen, path, units, name, over_batch, over_sequence):
    values = magnitude(name, *seen[path], units)
    return reduced(over_batch, [reduced(over_sequence, list(row)) for row in values])


@pytest.mark.parametrize("name", ["activation", "contribution"])
@pytest.mark.parametrize("variant", READERS)
def test_scores_are_those_of_the_naive_loop(variant, name):
    model, batches = tiny(variant), token_batches(2, 2, 5)
    seen = recorded(model, batches)
    groups = model.config.num_key_value_heads
    for over_batch, over_sequence in itertools.product(KINDS, KINDS):
        scores = rank(model, batches, name, over_batch, over_sequence).scores
        hidden = torch.zeros(48, dtype=torch.float64)
        for layer in range(4):
            prefix = f"model.layers.{layer}."
            how = (name, over_batch, over_sequence)
            neurons = scored(seen, prefix + "mlp.down_proj", 44, *how)
            heads = scored(seen, prefix + "self_attn.o_proj", 6, *how)
            kv_groups = scored(seen, prefix + "self_attn.o_proj", groups, *how)
            torch.testing.assert_close(scores["intermediate_size"][layer], neurons, **CLOSE)
            torch.testing.assert_close(scores["num_attention_heads"][layer], heads, **CLOSE)
            torch.testing.assert_close(scores["num_key_value_heads"][layer], kv_groups, **CLOSE)
            hidden += sum(scored(seen, prefix + path, 48, *how) for path in READERS[variant])
        torch.testing.assert_close(scores["hidden_size"], hidden, **CLOSE)


def test_the_defaults_are_the_papers_for_activation_and_rms_for_contribution():
    model, batches = tiny("llama"), token_batches(2, 2, 5)
    for name, over_batch, over_sequence in (("activation", "l2", "mean"), ("contribution", "l2", "l2")):
        given, default = rank(model, batches, name, over_batch, over_sequence), rank(model, batches, name)
        assert given.fingerprint == default.fingerprint
        assert default.info["metric"]["hidden_size"] == name
    assert rank(model, batches, "activation").fingerprint != rank(model, batches).fingerprint


def test_a_metric_can_be_chosen_for_one_axis():
    model, batches = tiny("llama"), token_batches(2, 2, 5)
    mixed = rank(model, batches, {"intermediate_size": "activation"})
    for axis, name in (("intermediate_size", "activation"), ("num_attention_heads", "contribution")):
        torch.testing.assert_close(mixed.scores[axis], rank(model, batches, name).scores[axis])


def test_l2_over_the_batch_of_means_by_hand():
    values = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[0.0, 4.0], [-4.0, 4.0]]])  # means: (2, 1) and (2, 4)
    aggregate = Aggregate("l2", "mean")
    aggregate.add(values[:1])
    aggregate.add(values[1:])
    torch.testing.assert_close(aggregate.score(), torch.tensor([8.0, 17.0], dtype=torch.float64).sqrt())
    # with the last token of the first row masked its means are (1, 2), whatever is in there
    values[0, 1] = 1e4
    masked = Aggregate("l2", "mean")
    masked.add(values, torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]]]))
    torch.testing.assert_close(masked.score(), torch.tensor([5.0, 20.0], dtype=torch.float64).sqrt())


@pytest.mark.parametrize("bad", [("sum", "mean"), ("l2", "max")])
def test_an_unknown_aggregation_is_refused(bad):
    with pytest.raises(NestlingError, match=r"not an aggregation: choose from mean, l2, var"):
        Aggregate(*bad)


def test_sums_do_not_grow_with_the_tokens():
    for over_batch, over_sequence in itertools.product(KINDS, KINDS):
        aggregate = Aggregate(over_batch, over_sequence)
        for rows, length in ((1, 3), (5, 50)):
            aggregate.add(torch.randn(rows, length, 7))
            held = [value for value in vars(aggregate).values() if isinstance(value, torch.Tensor)]
            assert [value.shape for value in held] == [(4, 7)]


# ---- what must not matter


def same(one, other, **close):
    for axis, scores in one.scores.items():
        torch.testing.assert_close(scores, other.scores[axis], **(close or CLOSE))


@pytest.mark.parametrize("over_sequence", KINDS)
@pytest.mark.parametrize("name", ["activation", "contribution"])
def test_order_and_size_of_batches_do_not_matter(name, over_sequence):
    model, batches = tiny("llama"), token_batches(4, 2, 7)
    whole = rank(model, batches, name, "l2", over_sequence)
    turned = rank(model, batches[::-1], name, "l2", over_sequence)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    parts = rank(model, [{"input_ids": part} for part in rows.split([1, 5, 2])], name, "l2", over_sequence)
    assert whole.fingerprint == turned.fingerprint == parts.fingerprint
    same(whole, turned)
    same(whole, parts)
    assert whole.info["tokens"] == parts.info["tokens"] == 56


def padded(rows, side):
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("over_sequence", KINDS)
@pytest.mark.parametrize("name", ["activation", "contribution"])
def test_padding_does_not_matter(name, over_sequence, side):
    model, rows = tiny("llama"), [torch.randint(3, VOCAB, (length,)) for length in (9, 4, 6)]
    alone = rank(model, [{"input_ids": row[None]} for row in rows], name, "l2", over_sequence)
    batch = padded(rows, side)
    together = rank(model, [batch], name, "l2", over_sequence)
    same(alone, together, rtol=1e-4, atol=1e-5)
    assert together.info["tokens"] == 19
    careless = rank(model, [{"input_ids": batch["input_ids"]}], name, "l2", over_sequence)
    assert not torch.allclose(careless.scores["hidden_size"], alone.scores["hidden_size"], rtol=1e-3)


# ---- planted units


@pytest.mark.parametrize("name", ["activation", "contribution"])
def test_planted_dead_and_strong_units_are_found(name):
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[5] = 0
            layer.mlp.up_proj.weight[9] *= 200
            layer.self_attn.v_proj.weight[:8] = 0  # KV group 0, hence heads 0 to 2
            layer.self_attn.v_proj.weight[8:] *= 5
    ranking = rank(model, token_batches(), name)
    for layer in range(4):
        neurons = ranking["intermediate_size"][layer]
        assert (neurons[0], neurons[-1]) == (9, 5)
        assert ranking["num_key_value_heads"][layer].tolist() == [1, 0]
        assert sorted(ranking["num_attention_heads"][layer][-3:].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("name", ["activation", "contribution"])
def test_planted_dead_and_strong_channels_are_found(name):
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[7], norm.weight[11] = 0, 100
    order = rank(model, token_batches(), name)["hidden_size"]
    assert (order[0], order[-1]) == (11, 7)


def test_contribution_sees_what_the_reader_makes_of_a_head():
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 8:16] = 0
            layer.self_attn.o_proj.weight[:, 32:40] *= 50
    for order in rank(model, token_batches())["num_attention_heads"]:
        assert (order[0], order[-1]) == (4, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_big_activations_of_half_precision_do_not_overflow(dtype):
    values = torch.full((2, 300, 6), 3e4, dtype=dtype)
    for over_batch, over_sequence in itertools.product(KINDS, KINDS):
        aggregate = Aggregate(over_batch, over_sequence)
        aggregate.add(values)
        assert aggregate.score().isfinite().all()
    for inside in (1, 8):
        parts, weight = torch.full((1, 4, 6, inside), 3e4, dtype=dtype), torch.full((48, 6, inside), 1.5, dtype=dtype)
        read = Reading(parts, torch.full((1, 4, 48), 6e4, dtype=dtype), weight)
        for name in ("activation", "contribution"):
            exact = Reading(parts.double(), read.output.double(), weight.double())
            found, expected = METRICS[name].magnitude(read), METRICS[name].magnitude(exact)
            torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0)


def test_a_token_for_which_nothing_is_written_scores_zero():
    for inside in (1, 8):
        half = {"dtype": torch.float16}
        read = Reading(
            torch.zeros(1, 2, 6, inside, **half), torch.zeros(1, 2, 48, **half), torch.ones(48, 6, inside, **half)
        )
        assert METRICS["contribution"].magnitude(read).eq(0).all()


# ---- custom metrics, refusals, and leaving the model as it was


@pytest.fixture
def constant():
    @metric("constant", over_batch="mean", over_sequence="mean")
    def count(read: Reading) -> torch.Tensor:
        return torch.arange(read.activation.shape[2]).double().expand(read.activation.shape[:3])

    yield count
    del METRICS["constant"]


def test_a_registered_metric_works_for_every_axis(constant):
    model = tiny("phi3")
    ranking = rank(model, token_batches(), "constant")
    assert ranking["hidden_size"].tolist() == list(range(48))[::-1]
    assert ranking["intermediate_size"][3].tolist() == list(range(44))[::-1]
    assert ranking["num_attention_heads"][0].tolist() == [5, 4, 3, 2, 1, 0]
    assert prune(model, ranking, {"intermediate_size": 8}).config.intermediate_size == 8


def test_unknown_names_and_no_data_are_refused():
    model = tiny("llama")
    with pytest.raises(NestlingError, match="'constant' is not an importance metric: choose from activation"):
        rank(model, token_batches(), "constant")
    with pytest.raises(NestlingError, match="'depth' is not a layer metric: choose from block_influence"):
        rank(model, token_batches(), layers="depth")
    with pytest.raises(DataError, match="no batches"):
        rank(model, [])
    with pytest.raises(DataError, match="put it into a list"):
        rank(model, token_batches()[0])


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__) for m in model.modules())


@pytest.mark.parametrize("layers", ["block_influence", "kl"])
@pytest.mark.parametrize("training", [True, False])
def test_an_exception_leaves_no_hook_and_the_training_flag(training, layers):
    model = tiny("llama").train(training)

    def broken(tokens):
        assert not model.training
        assert hooks_of(model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank(model, token_batches(), layers=layers, progress=broken)
    with pytest.raises(IndexError):
        rank(model, [{"input_ids": torch.full((1, 4), VOCAB)}], layers=layers)
    assert not hooks_of(model)
    assert all(module.training == training for module in model.modules())


def test_ranking_changes_no_weight():
    model = tiny("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rank(model, token_batches(), layers="kl", greedy_layers=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
