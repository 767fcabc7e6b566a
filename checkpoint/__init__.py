"""Sharded, asynchronous checkpoints that can be trusted.

A checkpoint is an immutable directory with a valid `MANIFEST.json`, or it is garbage. Input and output
are shards (`stoker.parallel.shards`), chunks of global tensors, so that reader and writer are independent of each
other's layout.

`owner`     a mark with the run's id in every place where checkpoints are kept
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
`stored`    manifest, state, indexes: the tensors of a checkpoint and their positions
`reader`, `block_reader`  byte ranges checked block by block, straight into the live shards
`resuming`  all ranks load the same checkpoint before any continues; a damaged one is set aside
`audit`, `compare`  lists, full verification, differences

A save: `save` records the moment and returns; a thread copies this rank's pieces to the staging pool, and
`await_staged` holds the next update until that is done. The thread writes the shard file, computing its CRC32s, then
the index, whose appearance is this rank's report. Rank 0 sees all reports in the file system, proves that the pieces
of each tensor tile it, writes the manifest and renames the directory. Before that rename there is no checkpoint; after
it, the checkpoint never changes. Every failure is reported in `SaveReport.error`, on every rank.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stoker.checkpoint.audit import Summary, describe, verify
from stoker.checkpoint.commit import fence, newest, newest_step
from stoker.checkpoint.names import CheckpointMismatch, DamagedCheckpoint
from stoker.checkpoint.owner import NotOurs, Owner, claim, problem_with, read_mark, read_owner
from stoker.checkpoint.remote import Remote
from stoker.checkpoint.retention import VALIDATION_LOSS, remove
from stoker.checkpoint.stored import open_checkpoint, read_state
from stoker.checkpoint.tier import linked_place, make_tier, tier_problem

if TYPE_CHECKING:
    from stoker.checkpoint.reader import TensorReader, load, read_tensors
    from stoker.checkpoint.resuming import resume
    from stoker.checkpoint.writer import Checkpoints, SaveReport

__all__ = [
    "VALIDATION_LOSS",
    "CheckpointMismatch",
    "Checkpoints",
    "DamagedCheckpoint",
    "NotOurs",
    "Owner",
    "Remote",
    "SaveReport",
    "Summary",
    "TensorReader",
    "claim",
    "describe",
    "fence",
    "linked_place",
    "load",
    "make_tier",
    "newest",
    "newest_step",
    "open_checkpoint",
    "problem_with",
    "read_mark",
    "read_owner",
    "read_state",
    "read_tensors",
    "remove",
    "resume",
    "tier_problem",
    "verify",
]

_OF = {  # they import torch, which commands that only look at a run need not wait for
    "Checkpoints": "writer",
    "SaveReport": "writer",
    "TensorReader": "reader",
    "load": "reader",
    "read_tensors": "reader",
    "resume": "resuming",
}


def __getattr__(name: str) -> Any:
    if name in _OF:
        return getattr(importlib.import_module(f"stoker.checkpoint.{_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
