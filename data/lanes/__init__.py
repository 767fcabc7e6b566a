"""Lanes: rows of data that are read, tokenised and packed on the fly.

    Units      pieces of a source read at once              units.py; lines.py, files.py, ...
    Windows    a few units shuffled together, tokenised     windows.py, read ahead by processes: readers.py
    deal       which lane reads which window                dealing.py
    LaneRows   rows cut out of the lanes                    rows.py, packed.py
    LaneStream this rank's rows of each global batch        stream.py, exchange.py

Row s of the global sequence belongs to lane s mod lanes, and data-parallel rank r owns the lanes l with l mod dp = r.
So each lane is one stream of documents that moves from rank to rank when the layout changes; dp must divide the number
of lanes, and the lanes the rows of a batch.

Which units make up window w follows from (seed, epoch) alone: a Feistel permutation of the units' numbers. Which lane
gets window w follows from what the windows before it held. That is dealt on demand, every `data.deal_every` rows of a
lane, from counts that the readers tell each other: see dealing.py. So which document goes where is a function of the
data and the seed, and no lane runs dry before all do.

The state is what was dealt and how many rows were taken: numbers of windows and places in them. Going on from it reads,
for each lane, the window it is in and the one dealt ahead, wherever in the run it is.
"""
