"""A fixture shared by the tests of optimizers and averages."""

import pytest

from tinyvit.kernels.cpu import optimizers


@pytest.fixture
def small_blocks(monkeypatch):
    """Pieces of a size that the small arrays of these tests do not fit in."""
    monkeypatch.setattr(optimizers, "BLOCK", 17)
