"""Data: from texts to the rows that this rank trains on.

    source     an ordered list of documents              stdlib.py, text.py, chat.py, or a user's data.target
    tokens     tokenised once, mapped from files         manifest.py, build.py, cache.py; token_files.py
    packing    documents -> rows                         packing.py, tables.py
    RowPlan    global row number -> row                  rows.py (the protocol), index.py, mixed.py, mixture.py
    IndexedLoader  this rank's rows of each global batch  indexed.py, readers.py

The order of the rows is a pure function of (texts, tokenizer, packing, seq_len, seed): `IndexPlan` answers "what is row
n?" in closed form, for any n, with no list of rows in memory, and `MixedPlan` which source it comes from. So the whole
state of the data is one row number. Ranks, reader processes, prefetching and restarts only decide which process reads a
row and when, never which row it is: data-parallel rank r of dp takes the rows first + r, first + r + dp, ... of a
global batch. The end of the data is arithmetic on the row number too, so all ranks compute the same end without
communication.

A row is `seq_len` tokens and the label of each, its next token. It is made of stretches of documents, each document
closed by an end-of-document token; a document that continues in another row shares one token with it, which is the last
label of the first row and the first token of the second. Every row of an epoch is read once before the next epoch, in
another order, begins.

The state carries a fingerprint of everything that the rows depend on. A state with another fingerprint is refused, with
the difference: a run never continues on other rows without notice.

What a launcher does once per machine (`prepare`) makes the ranks' `open_rows` cheap: it reads file stamps, no texts.
"""

from stoker.data.loader import EndOfData, IndexedLoader, RowSource
from stoker.data.opening import keep_tokenizer, open_rows, open_stream, open_tokenizer, vocabulary
from stoker.data.rows import RowPlan, read_rows
from stoker.data.samples import Sample, open_samples, prepare

__all__ = [
    "EndOfData",
    "IndexedLoader",
    "RowPlan",
    "RowSource",
    "Sample",
    "keep_tokenizer",
    "open_rows",
    "open_samples",
    "open_stream",
    "open_tokenizer",
    "prepare",
    "read_rows",
    "vocabulary",
]
