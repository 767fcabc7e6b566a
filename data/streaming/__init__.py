"""Streams: rows of data that are read, tokenised and packed on the fly.

    Splits     pieces of a source read at once              splits.py; lines.py, files.py, ...
    Windows    a few splits shuffled together, tokenised    shuffle_windows.py, read ahead by readers.py
    assign       which stream reads which window                assignment.py
    StreamRows  rows cut out of the streams                 stream_rows.py, packed.py
    StreamingLoader  this rank's rows of each global batch  loader.py, exchange.py

Row s of the global sequence belongs to stream s mod streams, and data-parallel rank r owns the streams l with l mod dp
= r. So each stream is one stream of documents that moves from rank to rank when the layout changes; dp must divide the
number of streams, and the streams the rows of a batch.

Which splits make up window w follows from (seed, epoch) alone: a Feistel permutation of the splits' numbers. Which
stream gets window w follows from the sizes of the windows before it. Windows are assigned on demand, every
`data.assign_every` rows of a stream, from counts that the readers exchange: see assignment.py. So the stream of each
document is a function of the data and the seed, and all streams end together.

The state is the assignment and the number of rows taken: numbers of windows and positions in them. Resuming from it
reads, for each stream, its current window and the one assigned ahead, at any point of the run.
"""
