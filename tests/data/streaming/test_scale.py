"""Planning on paper: 4,096 data-parallel ranks and 100,000 shards, every rank's mode played by one process."""

from __future__ import annotations

import json
import random
import time

import numpy as np

from stoker.data.remote.shards import Shard
from stoker.data.streaming.assignment import Count, Terms, assign, from_json, nothing_assigned, to_json
from stoker.data.streaming.lines import Lines
from stoker.data.streaming.shuffle_windows import ShuffleWindows
from stoker.data.streaming.splits import ByteBlocks
from stoker.data.tokenizer import ByteTokenizer

RANKS, SHARDS, PERIOD, SEQ_LEN = 4096, 100_000, 16, 4096


def test_a_large_run_starts_at_once_deals_in_no_time_and_keeps_a_small_state():
    chance = random.Random(0)
    began = time.process_time()
    shards = [Shard(f"s3://bucket/{n:06}.jsonl", chance.randrange(100 << 20, 300 << 20), "etag") for n in range(SHARDS)]
    splits = Lines(ByteBlocks(shards, 1 << 20), "text")
    windows = ShuffleWindows("web", splits, 4, 0, ByteTokenizer(), 0.0, False, None)
    terms = Terms(RANKS, windows.total, windows.per_epoch, SEQ_LEN, 1)
    assert windows.fingerprint["splits"] > 15_000_000
    assigned = nothing_assigned(RANKS)
    full = np.full(RANKS, PERIOD)
    sizes = [chance.randrange(800_000, 1_200_000) for _ in range(997)]

    def count(pairs):
        return {window: Count(sizes[window % 997], 300, sizes[window % 997]) for _, window in pairs}

    assigned = assign(assigned, terms, 0 * full, full, 2 * full, count)
    for _, window in assigned.uncounted[:1000]:
        windows.splits_of(window)
    assert time.process_time() - began < 10

    began, periods = time.process_time(), 60
    for period in range(1, periods + 1):
        assigned = assign(assigned, terms, period * full, full, 2 * full, count)
    assert (time.process_time() - began) / (
        periods * PERIOD
    ) < 0.01  # of a step of one second with a row of each stream
    state = json.dumps(to_json(assigned))
    assert len(state) < 5 << 20
    assert to_json(from_json(json.loads(state))) == to_json(assigned)
