"""Sharded, asynchronous checkpoints that can be trusted.

A checkpoint is an immutable directory with a valid `MANIFEST.json`, or it is garbage. What a rank holds comes in as
shards (`stoker.parallel.shards`), chunks of global tensors, and leaves as shards: neither side knows the other's
layout.

`tier`      where the first tier is: in the run directory, or in a faster place
`names`     directories and files, and the errors of this room
`format`    what the files hold: index and manifest, from values to bytes and back. No pickle, in either direction
`plan`      which chunks this rank writes (replicas share the work) and where in its file
`tiling`    the proof that every tensor is whole: one number per rank for the commit, every piece for readers
`staging`   the snapshot: live tensors copied to the image of the file (`memory`), beside the next forward and backward
`writer`    `Checkpoints`: a rank's saves, one in flight, in a background thread
`block_writer`  a shard file, block by block
`commit`    rank 0: reports -> proof -> manifest -> rename; fencing
`retention` which checkpoints stay
`remote`, `upload`  the second tier, and how what is committed gets there
`storage`   reads that cannot leave the checkpoint; removal
`stored`    manifest, state, indexes: what there is and where it stands
`reader`, `block_reader`  byte ranges checked block by block, straight into the live shards
`resuming`  no rank goes on before all have read the same checkpoint; a damaged one is set aside
`audit`, `compare`  lists, full verification, differences

The way of a save: `save` records the moment and returns; a thread copies this rank's pieces to the staging pool, and
`await_staged` holds the next update until that is done. The thread writes the shard file, its CRC32s on the way, then
the index, whose appearance is this rank's report. Rank 0 sees all reports in the file system, proves that the pieces
of each tensor tile it, writes the manifest and renames the directory. Before that rename there is no checkpoint; after
it, the checkpoint never changes. Whatever fails ends up in `SaveReport.error`, on every rank.
"""

from stoker.checkpoint.audit import Summary, describe, verify
from stoker.checkpoint.commit import fence
from stoker.checkpoint.compare import Difference, compare
from stoker.checkpoint.names import CheckpointMismatch, DamagedCheckpoint
from stoker.checkpoint.reader import TensorReader, load, read_tensors
from stoker.checkpoint.remote import Remote
from stoker.checkpoint.resuming import newest, newest_step, resume
from stoker.checkpoint.retention import VALIDATION_LOSS, remove
from stoker.checkpoint.stored import open_checkpoint, read_state
from stoker.checkpoint.tier import make_tier, tier_problem
from stoker.checkpoint.writer import Checkpoints, SaveReport

__all__ = [
    "VALIDATION_LOSS",
    "CheckpointMismatch",
    "Checkpoints",
    "DamagedCheckpoint",
    "Difference",
    "Remote",
    "SaveReport",
    "Summary",
    "TensorReader",
    "compare",
    "describe",
    "fence",
    "load",
    "make_tier",
    "newest",
    "newest_step",
    "open_checkpoint",
    "read_state",
    "read_tensors",
    "remove",
    "resume",
    "tier_problem",
    "verify",
]
