"""Streams: rows of data that are read, tokenised and packed on the fly.

    Units      pieces of a source read at once              splits.py; lines.py, files.py, ...
    Windows    a few splits shuffled together, tokenised     windows.py, read ahead by processes: readers.py
    assign       which stream reads which window                assignment.py
    LaneRows   rows cut out of the streams                    rows.py, packed.py
    LaneStream this rank's rows of each global batch        stream.py, exchange.py

Row s of the global sequence belongs to stream s mod streams, and data-parallel rank r owns the streams l with l mod dp
= r. So each stream is one stream of documents that moves from rank to rank when the layout changes; dp must divide the
number of streams, and the streams the rows of a batch.

Which splits make up window w follows from (seed, epoch) alone: a Feistel permutation of the splits' numbers. Which
stream gets window w follows from what the windows before it held. That is assigned on demand, every `data.assign_every`
rows of a stream, from counts that the readers tell each other: see assignment.py. So which document goes where is a
function of the data and the seed, and no stream runs dry before all do.

The state is what was assigned and how many rows were taken: numbers of windows and places in them. Going on from it
reads, for each stream, the window it is in and the one assigned ahead, wherever in the run it is.
"""
