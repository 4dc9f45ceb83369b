"""SiLU, SwiGLU, RMS norm and rotary positions: every version of each against torch, and what is refused."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from drawing import shapes, sides, values
from hypothesis import strategies as st
from operations import Example, checks_of, operations

from tinyvit import functional as F
from tinyvit.kernels.reference import variants as reference

rows = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3)


def silu(draw):
    beta = draw(st.sampled_from([1.0, 1.702]))
    x = values(draw, draw(shapes())) * draw(st.sampled_from([1, 50]))
    return Example([x], lambda x: x * torch.sigmoid(beta * x), {"beta": beta})


def swiglu(draw):
    x = values(draw, (*draw(rows), 2 * draw(sides)))
    return Example([x], lambda x: TF.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1])


def rms_norm(draw):
    n, eps = draw(sides), draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    x = values(draw, (*draw(rows), n), "spread")
    return Example([x, values(draw, (n,))], lambda x, weight: TF.rms_norm(x, (n,), weight, eps), {"eps": eps})


def rotary(draw):
    """As a product of complex numbers."""
    (b, h, n, d), interleaved = (draw(sides) for _ in range(4)), draw(st.booleans())
    angles = (draw(st.sampled_from([1, h])), n, d)

    def theirs(x, cos, sin):
        pairs = x.unflatten(-1, (d, 2)) if interleaved else x.unflatten(-1, (2, d)).transpose(-1, -2)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)
        turned = torch.view_as_real(turned)
        return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2)

    return Example(
        [values(draw, (b, h, n, 2 * d)), values(draw, angles), values(draw, angles)],
        theirs,
        {"interleaved": interleaved},
    )


CASES = {f.__name__: f for f in (silu, swiglu, rms_norm, rotary)}


def test_every_operation_has_a_case():
    assert operations(reference) == set(CASES)


test_every_version_agrees_with_torch, test_fewer_gradients_change_nothing = checks_of(reference, CASES)


def test_silu_of_large_values():
    x = np.array([1e4, -1e4, 100.0, -100.0, 0.0], np.float32)
    assert F.silu(x).data.tolist() == pytest.approx([1e4, 0, 100, 0, 0], abs=1e-30)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda x: F.swiglu(x[..., :3]), "swiglu expects x (..., 2 H), got (1, 2, 3, 3)"),
        (lambda x: F.rms_norm(x, x[0, 0, 0, :3]), "x (..., D) and weight (D,), got (1, 2, 3, 4) and (3,)"),
        (lambda x: F.rotary(x, x[0], x[0]), "(H or 1, N, D / 2), got (1, 2, 3, 4), (2, 3, 4) and (2, 3, 4)"),
        (lambda x: F.rotary(x[..., :3], x[0, ..., :1], x[0, ..., :1]), "got (1, 2, 3, 3), (2, 3, 1)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        call(np.zeros((1, 2, 3, 4)))
