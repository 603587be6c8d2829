"""Minimal pairs against one sentence at a time."""

import json
import math

import pytest
import torch

from nestling import evaluate
from nestling.errors import DataError
from nestling.evaluate import pairs
from tests.data import toy
from tests.models import tiny

SENTENCES = [
    ("the fox jumps", "the fox jump over all of them lazily"),
    ("the lazy dog", "dog"),
    ("a brown dog is here, I think, today", "a brown dog are here"),
    ("import os", "import sys"),
    ("x", "yyyyyyyyyyyyyyyyyyyyyy"),
]


def write(file, rows):
    file.write_text("".join(json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n" for good, bad in rows))
    return file


@torch.no_grad()
def log_p(model, tokenizer, sentence, prefix):
    ids = torch.tensor([[prefix, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]])
    logits = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    return logits[torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum().item()


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_scores_equal_one_sentence_at_a_time(batch_tokens, adds_bos, tmp_path):
    model, tokenizer = tiny("llama", vocab_size=toy.VOCAB), toy.tokenizer(adds_bos)
    flat = [sentence for pair in SENTENCES for sentence in pair]
    with torch.no_grad():
        found = pairs._scores(model, tokenizer, flat, batch_tokens, None)
    expected = [log_p(model, tokenizer, sentence, 1) for sentence in flat]
    assert found == pytest.approx(expected, abs=1e-9)
    result = evaluate.minimal_pairs(model, tokenizer, write(tmp_path / "a.jsonl", SENTENCES), batch_tokens=batch_tokens)
    right = [good > bad for good, bad in zip(expected[::2], expected[1::2], strict=True)]
    assert result.accuracy == sum(right) / len(right)


def test_a_folder_is_scored_per_file_and_in_all(tmp_path):
    model, tokenizer = tiny("llama", vocab_size=toy.VOCAB), toy.tokenizer()
    one = evaluate.minimal_pairs(model, tokenizer, write(tmp_path / "a.jsonl", SENTENCES))
    swapped = [(bad, good) for good, bad in SENTENCES]
    two = evaluate.minimal_pairs(model, tokenizer, write(tmp_path / "b.jsonl", [*swapped, *swapped]))
    both = evaluate.minimal_pairs(model, tokenizer, tmp_path)
    assert (both.per_file["a"].accuracy, both.per_file["b"].accuracy) == (one.accuracy, two.accuracy)
    assert two.accuracy == pytest.approx(1 - one.accuracy)  # no ties
    assert both.pairs == 15
    assert both.accuracy == pytest.approx((5 * one.accuracy + 10 * two.accuracy) / 15)
    p = both.accuracy
    assert both.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 14))


def test_a_tie_is_wrong_and_the_limit_counts_per_file(tmp_path):
    model, tokenizer, done = tiny("llama", vocab_size=toy.VOCAB), toy.tokenizer(), []
    write(tmp_path / "a.jsonl", [("the fox", "the fox")] * 4)
    write(tmp_path / "b.jsonl", [("the fox", "the fox")] * 3)
    found = evaluate.minimal_pairs(model, tokenizer, tmp_path, limit=2, batch_tokens=16, progress=done.append)
    assert (found.accuracy, found.pairs) == (0.0, 4)
    assert sum(done) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"sentence_good": "a"}\n', "line 1 .* sentence_good and sentence_bad"),
        (b'{"sentence_good": "a", "sentence_bad": "b"}\nnot json\n', "line 2"),
        (b"[1]\n", "line 1"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_files_that_are_no_pairs_are_refused(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        evaluate.minimal_pairs(tiny("llama", vocab_size=toy.VOCAB), toy.tokenizer(), tmp_path / "a.jsonl")


def test_missing_files_and_tokenizers_that_do_not_fit_are_refused(tmp_path):
    model = tiny("llama", vocab_size=toy.VOCAB)
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match=r"no \.jsonl file"):
            evaluate.minimal_pairs(model, toy.tokenizer(), path)
    file = write(tmp_path / "a.jsonl", SENTENCES)
    with pytest.raises(DataError, match="neither a BOS nor an EOS"):
        evaluate.minimal_pairs(model, toy.tokenizer(special=False), file)
    with pytest.raises(DataError, match="97 embeddings"):
        evaluate.minimal_pairs(tiny("llama"), toy.tokenizer(), tmp_path / "a.jsonl")
