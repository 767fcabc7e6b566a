"""Bytes of shards, wherever they lie: by range, checked, with patience.

    Shard      a URL, its size and the version that the server gave it        shards.py
    Store      bytes of shards by range: files, http(s), s3, pipes            store.py, web.py, systems.py
    retries    exponential backoff with jitter, going on at the broken byte   retries.py
    blocks     a cache of downloaded blocks on disk                           blocks.py
    Damaged    the one error, which names URL, byte and sample                damage.py

A shard never changes during a run: its size and version (the ETag, where there is one) are looked up once, and every
answer is compared with them. A connection that breaks, stalls or ends early is taken up again at the byte where it
broke, `data.retries` times; what is then still missing is `Damaged`, as is what can be read but not understood.
"""

from stoker.data.remote.damage import Damaged, Leftover, Loss, Report, refuse

__all__ = ["Damaged", "Leftover", "Loss", "Report", "refuse"]
