"""The autograd engine: tensors, the tape, and elementary operations."""
