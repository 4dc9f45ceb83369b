"""The autograd engine: tensors, the tape, and elementary operations."""

from tinyvit.engine import ops as ops  # gives Tensor its operators and methods, whichever module is imported first
