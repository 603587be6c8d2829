"""Rows of tokens: exact, deterministic, no more tokenized than asked for."""

import json

import pytest
import torch

from nestling.data import batches, check_tokenizer, packed, token_stream
from nestling.data.documents import documents
from nestling.errors import DataError
from tests.data import toy

EOS, BOS = 2, 1


@pytest.fixture
def corpus(tmp_path):
    rows = [{"text": f"document {i}: " + "the quick brown fox " * (i % 7 + 1)} for i in range(60)]
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("context", [2, 7, 32])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_rows_are_the_shuffled_documents_joined_with_eos(corpus, context, adds_bos):
    tokenizer = toy.tokenizer(adds_bos)
    rows = packed(corpus, tokenizer, context=context)["input_ids"]
    assert {len(row) for row in rows} == {context}
    flat = [token for row in rows for token in (row[1:] if adds_bos else row)]
    if adds_bos:
        assert {row[0] for row in rows} == {BOS}
    texts = tokenizer.decode(flat).split("</s>")
    assert set(texts[:-1]) <= set(documents(corpus))
    assert len(texts) - 1 >= len(list(documents(corpus))) - 2  # the last document may be cut off
    assert texts[:-1] != list(documents(corpus))[: len(texts) - 1]


def test_the_same_seed_gives_the_same_rows_and_another_other_ones(corpus):
    rows = [packed(corpus, toy.tokenizer(), context=16, seed=seed)["input_ids"][:] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_splits_do_not_overlap_in_rows(corpus):
    held = packed(corpus, toy.tokenizer(), context=16, split="validation")["input_ids"]
    train = packed(corpus, toy.tokenizer(), context=16)["input_ids"]
    assert 0 < len(held) < len(train) / 5


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (16, 1), (17, 2), (160, 10), (10**9, None)])
def test_tokens_are_rounded_up_to_rows_and_limited_by_the_source(corpus, tokens, rows):
    everything = len(packed(corpus, toy.tokenizer(), context=16))
    assert len(packed(corpus, toy.tokenizer(), context=16, tokens=tokens)) == (rows or everything)


def test_batches_hold_the_packed_rows(corpus):
    found = batches(corpus, toy.tokenizer(), context=16, tokens=16 * 7, batch_size=3)
    assert [batch["input_ids"].shape for batch in found] == [(3, 16), (3, 16), (1, 16)]
    assert found[0]["input_ids"].dtype == torch.int64
    rows = packed(corpus, toy.tokenizer(), context=16, tokens=16 * 7)["input_ids"][:]
    assert torch.cat([batch["input_ids"] for batch in found]).tolist() == rows


def test_no_more_is_tokenized_than_the_budget_asks_for():
    class Counting:
        def __init__(self):
            self.tokenizer, self.characters = toy.tokenizer(), 0

        def __call__(self, texts, **options):
            self.characters += sum(map(len, texts)) if isinstance(texts, list) else 0
            return self.tokenizer(texts, **options)

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

    few, many = Counting(), Counting()
    packed("builtin:stdlib", few, context=64, tokens=640)
    packed("builtin:stdlib", many, context=64, tokens=64_000)
    assert 0 < few.characters < 50_000 < many.characters < 500_000


def test_a_small_budget_samples_many_files():
    rows = packed("builtin:stdlib", toy.tokenizer(), context=64, tokens=64 * 200)["input_ids"][:]
    assert sum(row.count(EOS) for row in rows) >= 5


def test_a_stream_in_order_is_every_document_and_eos(corpus):
    tokenizer = toy.tokenizer()
    ids = list(token_stream(corpus, tokenizer, split="all"))
    assert tokenizer.decode(ids) == "".join(text + "</s>" for text in documents(corpus, "all"))


def test_long_documents_are_cut_into_pieces_that_are_shuffled(tmp_path):
    (tmp_path / "long.txt").write_text("".join(f"{i}\n" for i in range(4000)))
    ids = list(token_stream(tmp_path / "long.txt", toy.tokenizer(), split="all", piece=2000, seed=0))
    text = toy.tokenizer().decode(ids).replace("</s>", "")
    assert not text.startswith("0\n1\n")
    assert sorted(map(int, text.split())) == list(range(4000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 100_000}, "fewer than 100000 tokens .* which is one row"),
        ({"context": 1}, "at least 2 tokens"),
        ({"context": 8, "tokens": 0}, "ask for at least 1"),
    ],
)
def test_impossible_rows_are_refused(corpus, options, message):
    with pytest.raises(DataError, match=message):
        packed(corpus, toy.tokenizer(), **options)


def test_a_batch_needs_a_row(corpus):
    with pytest.raises(DataError, match="batch_size 0"):
        batches(corpus, toy.tokenizer(), context=8, batch_size=0)


def test_documents_need_something_between_them(corpus):
    with pytest.raises(DataError, match="neither an EOS nor a BOS"):
        packed(corpus, toy.tokenizer(special=False), context=8)


@pytest.mark.parametrize(("vocab", "fits"), [(299, False), (300, True), (512, True), (1324, True), (1400, False)])
def test_a_tokenizer_has_to_fit_the_model(vocab, fits):
    if fits:
        check_tokenizer(toy.tokenizer(), vocab)
    else:
        with pytest.raises(DataError, match=f"300 tokens and the model {vocab:,} embeddings"):
            check_tokenizer(toy.tokenizer(), vocab)
