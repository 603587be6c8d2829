"""Text in, rows of tokens out: the built-in corpus, local files and hub datasets behind one name.

What a spec means is in `documents`, how documents become rows in `pack`. Nothing here knows a model: what is needed
from it is a vocabulary size. See docs/data.md for splits and packing in words.
"""

from nestling.data.calibration import calibration
from nestling.data.documents import documents
from nestling.data.pack import batches, check_tokenizer, packed, token_stream
from nestling.data.shared import packed_once
from nestling.data.vocabulary import train_tokenizer

__all__ = [
    "batches",
    "calibration",
    "check_tokenizer",
    "documents",
    "packed",
    "packed_once",
    "token_stream",
    "train_tokenizer",
]
