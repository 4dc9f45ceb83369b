"""A plugin of pytest: this processor seems to have AMX, whose instructions `amx.c` carries out."""

import ctypes
import os

from llvmlite import binding

from tinyvit.kernels import jit

library = ctypes.CDLL(os.environ["AMX_EMULATOR"])
library.install()
features = binding.get_host_cpu_features()
features.update({"amx-tile": True, "amx-bf16": True, "amx-int8": True})
binding.get_host_cpu_features = lambda: features
jit._tiles_permitted = lambda: True


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"AMX instructions: {ctypes.c_long.in_dll(library, 'instructions').value}")
