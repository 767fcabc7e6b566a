"""Bytes of shards on any storage: by range, checked, with retries.

    Shard      a URL, its size and its version from the server        shards.py
    Store      bytes of shards by range: files, http(s), s3, pipes            store.py, web.py, systems.py
    retries    exponential backoff with jitter, from the byte where it broke   retries.py
    blocks     a cache of downloaded blocks on disk                           blocks.py
    Damaged    the one error, which names URL, byte and sample                damage.py

A shard never changes during a run: its size and version (the ETag, where there is one) are looked up once, and every
answer is compared with them. A connection that breaks, stalls or ends early is resumed at the byte where it
broke, `data.retries` times; data that are then still missing are `Damaged`, as are data that cannot be parsed.
"""

from stoker.data.remote.damage import Damaged, Leftover, Loss, Report, refuse

__all__ = ["Damaged", "Leftover", "Loss", "Report", "refuse"]
