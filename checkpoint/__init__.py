"""Sharded, asynchronous checkpoints that can be trusted.

A checkpoint is an immutable directory with a valid `MANIFEST.json`, or it is garbage. What a rank holds comes in as
shards (`parallel.shards`), rectangles of global tensors, and leaves as shards: neither side knows the other's layout.

`names`    directories and files, and the errors of this room
`format`   what the files hold: index and manifest, from values to bytes and back. No pickle, in either direction
`plan`     which rectangles this rank writes (replicas share the work) and where in its file
`staging`  the snapshot: live tensors copied to the image of the file, beside the next forward and backward
`storage`  durable writes; reads that cannot leave the checkpoint
`writer`   `Checkpoints`: a rank's saves, one in flight, in a background thread
`commit`   rank 0: reports -> proof that every tensor is whole -> manifest -> rename; retention, fencing
`tiling`   that proof
`reader`   byte ranges checked block by block, into fresh memory
`resuming` all ranks agree on a checkpoint before any adopts it; a damaged one is set aside
`audit`    lists and full verification

The way of a save: `save` records the moment and returns; a thread copies this rank's pieces to the staging pool, and
`await_staged` holds the next update until that is done. The thread writes the shard file, its CRC32s on the way, then
the index, whose appearance is this rank's report. Rank 0 sees all reports in the file system, proves that the pieces
of each tensor tile it, writes the manifest and renames the directory. Before that rename there is no checkpoint; after
it, the checkpoint never changes. Whatever fails ends up in `SaveReport.error`, on the rank and on rank 0.
"""

from checkpoint.audit import Summary, describe, verify
from checkpoint.commit import fence
from checkpoint.names import CheckpointMismatch, DamagedCheckpoint
from checkpoint.reader import load, open_checkpoint, read_state, read_tensors
from checkpoint.resuming import newest, resume
from checkpoint.writer import Checkpoints, SaveReport

__all__ = [
    "CheckpointMismatch",
    "Checkpoints",
    "DamagedCheckpoint",
    "SaveReport",
    "Summary",
    "describe",
    "fence",
    "load",
    "newest",
    "open_checkpoint",
    "read_state",
    "read_tensors",
    "resume",
    "verify",
]
