"""A plugin of pytest: this processor seems to have the instructions EMULATED, which `instructions.c` carries out.

Run by itself, it multiplies blocks of bytes by them.
"""

import ctypes
import os

from llvmlite import binding

from tinyvit.kernels import jit

NAMES = {"amx": ("amx-tile", "amx-bf16", "amx-int8"), "avxvnni": ("avxvnni",)}
HIDDEN = {"amx": (), "avxvnni": ("avx512vnni", *NAMES["amx"])}

library = ctypes.CDLL(os.environ["EMULATOR"])
library.install()
features, kind = binding.get_host_cpu_features(), os.environ["EMULATED"]
features.update(dict.fromkeys(NAMES[kind], True) | dict.fromkeys(HIDDEN[kind], False))
binding.get_host_cpu_features = lambda: features
jit._tiles_permitted = lambda: True


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(count())


def count():
    return f"instructions: {ctypes.c_long.in_dll(library, 'instructions').value}"


def multiply_blocks():
    import numpy as np
    from numba import njit

    from tinyvit.kernels.jit import dot_blocks

    rng, rows, panel = np.random.default_rng(0), dot_blocks.TILE, dot_blocks.PANEL

    def compiled(block):
        @njit
        def run(a, b, start, c):
            row = c.shape[1]
            block(a.ctypes.data, a.shape[1], b.ctypes.data, start.ctypes.data, row, c.ctypes.data, row, len(b))

        return run

    for width in (panel, panel // 2):
        run = compiled(dot_blocks.block_of(True, width))
        for depth in (1, 2, 77):
            a, b = rng.integers(0, 256, (rows, depth, 4), np.uint8), rng.integers(-128, 128, (depth, panel, 4), np.int8)
            start, c = rng.integers(-99, 99, (rows, panel), np.int32), np.full((rows, panel), 7, np.int32)
            run(a.view(np.int32)[..., 0], b.view(np.int32)[..., 0], start, c)
            expected = start + np.einsum("rdk,dpk->rp", a.astype(np.int32), b.astype(np.int32))
            assert np.array_equal(c[:, :width], expected[:, :width]) and (c[:, width:] == 7).all()


if __name__ == "__main__":
    multiply_blocks()
    print(jit.dot_instructions(), count())
