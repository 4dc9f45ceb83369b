"""Blocks of sums of products of 16 and 8 bits, by the instructions that processors have for them.

Each adds neighbouring products to sums of 32 bits: VDPBF16PS and VPDPBUSD for 16 sums in a register (AVX-512), VPDPBUSD
for 8 (AVX-VNNI), TDPBF16PS and TDPBUSD for 16 x 16 in a tile (AMX), BFMMLA and USMMLA for 2 x 2 (ARM). AVX2 alone has
VPMADDWD, of whole numbers of 16 bits, which then hold the bytes. `dot_products` has the layout of the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import int64, void
from numba.core import cgutils
from numba.extending import intrinsic

from tinyvit.kernels import jit
from tinyvit.kernels.jit.compiling import compiled

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"

binding.initialize_native_asmparser()  # the instructions have no name in llvmlite

KIND = jit.dot_instructions()
# Rows of A in a block, and groups of the inner dimension that an instruction, or an unrolled loop, takes at a time.
TILE, STEP = {"amx": (32, 16), "arm": (8, 4), "avxvnni": (6, 1), "avx2": (4, 2)}.get(KIND, (8, 1))
PANEL = 32  # columns of a block
# Whole numbers in a group, and what is added to those of A: that of bytes has no sign.
WHOLE, OFFSET = (np.int16, 0) if KIND == "avx2" else (np.uint8, 128)
IN_GROUP = 4 // np.dtype(WHOLE).itemsize
INT, SIZE = ir.IntType(32), ir.IntType(64)
REALS, GROUPS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(INT, 16)
_QUAD = ir.VectorType(INT, 4)


def _at(builder, address, place, kind):
    """A pointer to `kind`, so many units of 4 bytes behind the address."""
    return builder.inttoptr(builder.add(address, builder.mul(place, SIZE(4))), kind.as_pointer())


def load(builder, address, place, kind=REALS):
    return builder.load(_at(builder, address, place, kind), align=4)


def store(builder, x, address, place):
    builder.store(x, _at(builder, address, place, x.type), align=4)


def shuffled(builder, a, b, places):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(places)), list(places)))


def allow_instructions(builder):
    """Let LLVM use ARM's instructions in this function, which may be missing in what it knows of the processor."""
    if KIND == "arm":
        known = [*filter(None, binding.get_host_cpu_features().flatten().split(",")), "+neon", "+bf16", "+i8mm"]
        set.add(builder.function.attributes, f'"target-features"="{",".join(known)}"')


def _add_products(of_bytes: bool, builder, total, x, y):
    """The sums in a register and the products of two."""
    vector = total.type
    if KIND == "avx2":
        pairs = ir.VectorType(ir.IntType(16), 2 * vector.count)
        kind = ir.FunctionType(vector, [pairs, pairs])
        multiply = builder.module.declare_intrinsic("llvm.x86.avx2.pmadd.wd", (), kind)
        return builder.add(total, builder.call(multiply, [builder.bitcast(x, pairs), builder.bitcast(y, pairs)]))
    name, registers = ("{vex} vpdpbusd", "x") if KIND == "avxvnni" else ("vpdpbusd", "v")
    if not of_bytes and jit.has("avx512bf16"):  # else LLVM would end the process; nobody asks for such a product
        name = "vdpbf16ps"
    constraint = f"={registers},0,{registers},{registers}"
    add = ir.InlineAsm(ir.FunctionType(vector, [vector] * 3), f"{name} $3, $2, $0", constraint)
    return builder.call(add, [total, x, y])


def _of_vectors(of_bytes: bool, width: int, builder, a, a_row, b, start, start_row, c, c_row, depth):
    """Two registers of columns at a time."""
    lanes = 16 if KIND == "avx512" else 8
    vector = ir.VectorType(INT, lanes)
    rows, columns = range(TILE), range(0, min(width, 2 * lanes), lanes)
    sums = [[cgutils.alloca_once(builder, vector) for _ in columns] for _ in rows]
    offsets = [builder.mul(a_row, SIZE(i)) for i in rows]
    with cgutils.for_range_slice(builder, SIZE(0), SIZE(width), SIZE(2 * lanes)) as (left, _):

        def place(row, i, j):
            return builder.add(builder.mul(row, SIZE(i)), builder.add(left, SIZE(j)))

        for i in rows:
            for j, total in zip(columns, sums[i], strict=True):
                builder.store(load(builder, start, place(start_row, i, j), vector), total)
        with cgutils.for_range_slice(builder, SIZE(0), depth, SIZE(STEP)) as (near, _):
            for k in [builder.add(near, SIZE(step)) for step in range(STEP)]:
                ys = [load(builder, b, place(k, PANEL, j), vector) for j in columns]
                for i in rows:
                    group = load(builder, a, builder.add(k, offsets[i]), INT)
                    first = builder.insert_element(ir.Constant(vector, ir.Undefined), group, SIZE(0))
                    x = shuffled(builder, first, first, [0] * lanes)
                    for y, total in zip(ys, sums[i], strict=True):
                        builder.store(_add_products(of_bytes, builder, builder.load(total), x, y), total)
        for i in rows:
            for j, total in zip(columns, sums[i], strict=True):
                store(builder, builder.load(total), c, place(c_row, i, j))


def _of_amx(of_bytes: bool, width: int, builder, a, a_row, b, start, start_row, c, c_row, depth):
    """Four tiles of sums, two of A and two of B. LLVM itself uses none: the numbers of the tiles are ours."""
    none = ir.FunctionType(ir.VoidType(), [])
    of_memory = ir.FunctionType(ir.VoidType(), [SIZE, SIZE])

    def move(code, address, place, row):
        asm = ir.InlineAsm(of_memory, code, "r,r,~{memory}", side_effect=True)
        builder.call(asm, [builder.add(address, builder.mul(place, SIZE(4))), builder.mul(row, SIZE(4))])

    columns = range(width // 16)
    sums = [(i, j, f"%tmm{2 * i + j}") for i in range(2) for j in columns]
    multiply = "tdpbusd" if of_bytes else "tdpbf16ps"

    for i, j, tile in sums:
        place = builder.add(builder.mul(start_row, SIZE(16 * i)), SIZE(16 * j))
        move(f"tileloadd ($0,$1,1), {tile}", start, place, start_row)
    with cgutils.for_range_slice(builder, SIZE(0), depth, SIZE(STEP)) as (near, _):
        line = builder.mul(near, SIZE(PANEL))
        for j in columns:
            move(f"tileloadd ($0,$1,1), %tmm{6 + j}", b, builder.add(line, SIZE(16 * j)), SIZE(PANEL))
        for i in range(2):
            place = builder.add(builder.mul(a_row, SIZE(16 * i)), near)
            move(f"tileloadd ($0,$1,1), %tmm{4 + i}", a, place, a_row)
        for i, j, tile in sums:
            builder.call(ir.InlineAsm(none, f"{multiply} %tmm{6 + j}, %tmm{4 + i}, {tile}", "", side_effect=True), [])
    for i, j, tile in sums:
        place = builder.add(builder.mul(c_row, SIZE(16 * i)), SIZE(16 * j))
        move(f"tilestored {tile}, ($0,$1,1)", c, place, c_row)


def _of_arm(of_bytes: bool, width: int, builder, a, a_row, b, start, start_row, c, c_row, depth):
    """Eight columns at a time. A register holds the sums of two rows and two columns."""
    code = "usmmla $0.4s, $2.16b, $3.16b" if of_bytes else "bfmmla $0.4s, $2.8h, $3.8h"
    add = ir.InlineAsm(ir.FunctionType(_QUAD, [_QUAD] * 3), code, "=w,0,w,w")

    def zipped(pairs: Sequence[Sequence[Any]], halves: tuple[list[int], list[int]]) -> list[Any]:
        return [shuffled(builder, *pair, places) for pair in pairs for places in halves]

    of_columns, of_rows = ([0, 4, 1, 5], [2, 6, 3, 7]), ([0, 1, 4, 5], [2, 3, 6, 7])
    rows = range(0, TILE, 2)
    sums = [[cgutils.alloca_once(builder, _QUAD) for _ in range(4)] for _ in rows]
    with cgutils.for_range_slice(builder, SIZE(0), SIZE(width), SIZE(8)) as (left, _):

        def line(address, row, i, place):
            return load(builder, address, builder.add(builder.mul(row, SIZE(i)), place), _QUAD)

        quarters = [left, builder.add(left, SIZE(4))]
        for i, totals in zip(rows, sums, strict=True):
            blocks = zipped([[line(start, start_row, i + k, q) for k in (0, 1)] for q in quarters], of_rows)
            for x, total in zip(blocks, totals, strict=True):
                builder.store(x, total)
        with cgutils.for_range_slice(builder, SIZE(0), depth, SIZE(STEP)) as (near, _):
            xs = [zipped([(line(a, a_row, i, near), line(a, a_row, i + 1, near))], of_rows) for i in rows]
            for half in range(2):
                place = builder.mul(builder.add(near, SIZE(2 * half)), SIZE(PANEL))
                ys = zipped(
                    [[line(b, SIZE(PANEL), k, builder.add(place, q)) for k in (0, 1)] for q in quarters], of_columns
                )
                for x, totals in zip(xs, sums, strict=True):
                    for y, total in zip(ys, totals, strict=True):
                        builder.store(builder.call(add, [builder.load(total), x[half], y]), total)
        for i, totals in zip(rows, sums, strict=True):
            for j, q in enumerate(quarters):
                two = [builder.load(total) for total in totals[2 * j : 2 * j + 2]]
                for k, x in enumerate(zipped([two], of_rows)):
                    store(builder, x, c, builder.add(builder.mul(c_row, SIZE(i + k)), q))


_generate = {"amx": _of_amx, "arm": _of_arm}.get(KIND, _of_vectors)


def block_of(of_bytes: bool, width: int) -> Any:
    """A function that makes C = start + A B for TILE rows of A and so many columns of a panel B, of `depth` groups.

    It takes addresses, and lengths of rows in units of 4 bytes. Sums of whole numbers are moved as if they were real.
    """

    @intrinsic
    def function(typing, a, a_row, b, start, start_row, c, c_row, depth):
        def generate(context, builder, signature, args):
            allow_instructions(builder)
            _generate(of_bytes, width, builder, *args)
            return context.get_dummy_value()

        return void(*(int64,) * 8), generate

    return function


@intrinsic
def add_row(typing, x, y, to):
    """PANEL numbers x + y, of addresses."""

    def generate(context, builder, signature, args):
        x, y, to = args
        for j in range(0, PANEL, 16):
            total = builder.fadd(load(builder, x, SIZE(j)), load(builder, y, SIZE(j)))
            store(builder, total, to, SIZE(j))
        return context.get_dummy_value()

    return void(int64, int64, int64), generate


@intrinsic
def prefetch(typing, address):
    """Bring the cache line at an address to the L2 cache."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(function, [place, INT(0), INT(2), INT(1)])  # for reading, locality 2: the L2 cache, data
        return context.get_dummy_value()

    return void(int64), generate


_CONFIGURATION = np.zeros(64, np.uint8)  # of 8 tiles of 16 rows and 64 bytes
_CONFIGURATION[0] = 1
_CONFIGURATION[16:32:2], _CONFIGURATION[48:56] = 64, 16


@intrinsic
def _configure_tiles(typing, configuration):

    def generate(context, builder, signature, args):
        if KIND == "amx":
            kind = ir.FunctionType(ir.VoidType(), [SIZE])
            builder.call(ir.InlineAsm(kind, "ldtilecfg ($0)", "r,~{memory}", side_effect=True), args)
        return context.get_dummy_value()

    return void(int64), generate


@compiled()
def use_tiles():
    """With AMX, configure the tiles of this thread, until `release_tiles`; else nothing."""
    _configure_tiles(_CONFIGURATION.ctypes.data)


@intrinsic
def release_tiles(typing):
    def generate(context, builder, signature, args):
        if KIND == "amx":
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(ir.InlineAsm(kind, "tilerelease", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return void(), generate
