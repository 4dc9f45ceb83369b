"""Saving and loading weights, ours and other libraries': written whole or not at all, read without executing anything.

From bottom to top: `checkpoint` (the dataclass and its error), `readers` (files to arrays), `native_file` (our own
files), `formats` (other libraries' names to ours), `loading` and `convert`.
"""

from tinyvit.checkpoints.checkpoint import BEST as BEST
from tinyvit.checkpoints.checkpoint import LAST as LAST
from tinyvit.checkpoints.checkpoint import Checkpoint as Checkpoint
from tinyvit.checkpoints.checkpoint import CheckpointError as CheckpointError
from tinyvit.checkpoints.checkpoint import describe as describe
from tinyvit.checkpoints.convert import convert as convert
from tinyvit.checkpoints.loading import load_model as load_model
from tinyvit.checkpoints.loading import open_checkpoint as open_checkpoint
from tinyvit.checkpoints.native_file import read as read
from tinyvit.checkpoints.native_file import read_metadata as read_metadata
from tinyvit.checkpoints.native_file import save as save
