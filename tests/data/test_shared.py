"""Text is tokenized by one process of a machine, and all of its processes have the same rows."""

import datasets
import pytest

from nestling import processes
from nestling.data import packed, packed_once
from nestling.errors import DataError
from tests import checkpoint
from tests.several import together

HOW = {"context": 16, "tokens": 160}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return str(checkpoint.write_text(tmp_path / "text.jsonl"))


class Counted:
    """A tokenizer that counts the texts it is given."""

    def __init__(self):
        self.own, self.texts = checkpoint.tokenizer(), 0

    def __getattr__(self, name):
        return getattr(self.own, name)

    def __call__(self, texts, **how):
        self.texts += len(texts)
        return self.own(texts, **how)


def rows_and_texts(text):
    tokenizer = Counted()
    rows = packed_once(text, tokenizer, **HOW)
    return processes.number(), rows["input_ids"][:], tokenizer.texts, len(rows.cache_files)


def test_the_first_process_tokenizes_and_all_read(text, tmp_path):
    expected = packed(text, checkpoint.tokenizer(), **HOW)["input_ids"][:]
    (first, rows, texts, files), (second, others, none, mapped) = together(2, tmp_path, rows_and_texts, text)
    assert (first, second) == (0, 1)
    assert rows == others == expected
    assert texts > 0 == none
    assert files == mapped == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_process_needs_no_file(text, tmp_path):
    number, rows, texts, files = rows_and_texts(text)
    assert (number, len(rows), files) == (0, 10, 0)
    assert texts > 0
    assert not (tmp_path / "cache").exists()


def refused(text, **how):
    with pytest.raises(DataError) as met:
        packed_once(text, checkpoint.tokenizer(), **how)
    return str(met.value)


def test_what_one_process_refuses_all_refuse(text, tmp_path):
    said = together(2, tmp_path, lambda: refused(text, context=10**6))
    assert said[0] == said[1]
    assert "has fewer than 1000000 tokens" in said[0]
    (tmp_path / "cache").write_text("a file, so nothing can be kept in it")
    said = together(2, tmp_path, lambda: refused(text, **HOW))
    assert said[0] == said[1]
    assert "cannot be kept in" in said[0]
