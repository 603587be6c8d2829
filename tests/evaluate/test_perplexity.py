"""Perplexity against a loop that looks up one token at a time in float64."""

import json
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nestling import evaluate
from nestling.data import batches, token_stream
from nestling.errors import DataError
from nestling.evaluate import score
from tests.data import toy
from tests.models import VARIANTS, in_float64, tiny


def model_of(variant="llama", **options):
    return tiny(variant, vocab_size=toy.VOCAB, **options)


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    rows = [{"text": f"document {i}: " + "the quick brown fox " * (i % 5)} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def naive(model, ids, context, stride, bos=None):
    """Loss of every token from its own forward pass: the window that first reaches it, cut off right before it."""
    losses, first = [], 1 if bos is None else 0
    for place in range(first, len(ids)):
        rank = place - first
        window = 0 if rank < context else -(-(rank - context + 1) // stride)
        start = window * stride
        seen = ids[start:place] if bos is None else [bos, *ids[start:place]]
        logits = model(torch.tensor([seen])).logits[0, -1].double()
        losses.append(-torch.log_softmax(logits, -1)[ids[place]].item())
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 8), (8, 3), (8, 1), (100_000, None), (2, 2)])
@pytest.mark.parametrize("adds_bos", [False, True])
@torch.no_grad()
def test_it_equals_the_naive_loop(context, stride, adds_bos, corpus):
    model, tokenizer = model_of(max_position_embeddings=2048), toy.tokenizer(adds_bos)
    ids = list(token_stream(corpus, tokenizer, split="validation"))
    context = min(context, len(ids) + 5)
    found = evaluate.perplexity(model, tokenizer, corpus, context=context, stride=stride, batch_size=3)
    loss, count = naive(model, ids, context, stride or context, 1 if adds_bos else None)
    assert found.tokens == count
    assert found.loss == pytest.approx(loss, abs=1e-10)
    assert found.value == pytest.approx(math.exp(loss))
    assert (found.context, found.stride) == (context, stride or context)


@torch.no_grad()
def test_the_loop_would_notice_another_stride(corpus):
    model, tokenizer = model_of(), toy.tokenizer()
    ids = list(token_stream(corpus, tokenizer, split="validation"))
    found = evaluate.perplexity(model, tokenizer, corpus, context=8, stride=3)
    assert found.loss != pytest.approx(naive(model, ids, 8, 4)[0], abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_architecture_gets_its_own_loss(variant):
    model = model_of(variant)
    ids = torch.randint(toy.VOCAB, (3, 11))
    with in_float64():
        found = evaluate.perplexity(model, None, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}])
        logits = torch.log_softmax(model(ids).logits[:, :-1], -1)
    assert found.loss == pytest.approx(-logits.gather(-1, ids[:, 1:, None]).mean().item(), abs=1e-10)
    assert found.tokens == 30


@torch.no_grad()
def test_an_architecture_without_declaration_is_scored_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = torch.randint(50, (2, 9))
    found = evaluate.perplexity(model, None, [{"input_ids": ids}])
    assert found.loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_logits_exist_in_chunks_only_and_chunks_change_nothing(monkeypatch):
    model, seen = model_of(), []
    data = [{"input_ids": torch.randint(toy.VOCAB, (4, 9))}]
    whole = evaluate.perplexity(model, None, data)
    monkeypatch.setattr(score, "CHUNK_NUMBERS", 5 * toy.VOCAB)
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.numel()))
    chunked = evaluate.perplexity(model, None, data)
    assert chunked.loss == pytest.approx(whole.loss, abs=1e-12)
    assert sum(seen) == 32 * toy.VOCAB
    assert max(seen) == 5 * toy.VOCAB


def test_tokens_count_not_batches():
    model = model_of()
    rows = [torch.randint(toy.VOCAB, (1, length)) for length in (3, 20)]
    parts = [evaluate.perplexity(model, None, [{"input_ids": row}]) for row in rows]
    both = evaluate.perplexity(model, None, [{"input_ids": row} for row in rows])
    assert both.loss == pytest.approx((2 * parts[0].loss + 19 * parts[1].loss) / 21, abs=1e-12)
    assert both.loss != pytest.approx((parts[0].loss + parts[1].loss) / 2, abs=1e-6)


def test_padding_and_masked_labels_are_left_out():
    model = model_of()
    ids = torch.randint(toy.VOCAB, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (torch.arange(13) < 9).long()[None]
    labels = padded.masked_fill(mask == 0, -100)
    plain = evaluate.perplexity(model, None, [{"input_ids": ids}])
    for extra in ({"attention_mask": mask}, {"labels": labels}):
        found = evaluate.perplexity(model, None, [{"input_ids": padded, **extra}])
        assert (found.tokens, found.loss) == (plain.tokens, pytest.approx(plain.loss, abs=1e-12))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_limit_scores_that_many_tokens_and_always_the_same(adds_bos, corpus):
    model, tokenizer = model_of(), toy.tokenizer(adds_bos)
    found = [evaluate.perplexity(model, tokenizer, corpus, context=8, tokens=50, split="all") for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].tokens == 50


def test_it_reads_what_packed_batches_hold_much_alike(corpus):
    model, tokenizer = model_of(), toy.tokenizer()
    rows = batches(corpus, tokenizer, context=8, split="all")
    stream = evaluate.perplexity(model, tokenizer, corpus, context=8, split="all")
    assert evaluate.perplexity(model, tokenizer, rows).loss == pytest.approx(stream.loss, rel=0.2)


def test_progress_adds_up_and_the_mode_is_put_back(corpus):
    model, seen = model_of().train(), []
    found = evaluate.perplexity(model, toy.tokenizer(), corpus, context=8, batch_size=1, progress=seen.append)
    assert sum(seen) == found.tokens
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride 0"),
        ({"stride": 9}, "give 1 to 8"),
        ({"context": 1}, "at least 2"),
        ({"tokens": 0}, "at least 1"),
    ],
)
def test_impossible_windows_are_refused(options, message, corpus):
    with pytest.raises(DataError, match=message):
        evaluate.perplexity(model_of(), toy.tokenizer(), corpus, **({"context": 8} | options))


def test_data_that_does_not_fit_is_refused(corpus, tmp_path):
    with pytest.raises(DataError, match="needs the model's tokenizer"):
        evaluate.perplexity(model_of(), None, corpus)
    with pytest.raises(DataError, match="300 tokens and the model 97 embeddings"):
        evaluate.perplexity(tiny("llama"), toy.tokenizer(), corpus)
    for data in ([], [{"input_ids": torch.ones(2, 1, dtype=torch.long)}]):
        with pytest.raises(DataError, match="no token to score"):
            evaluate.perplexity(model_of(), None, data)
