"""Damaged copies of files, drawn from a seed: TINYVIT_FUZZ_ROUNDS=2000 draws more of them than the suite does."""

import os
import random

ROUNDS = int(os.environ.get("TINYVIT_FUZZ_ROUNDS", "60"))
NUMBERS = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def damaged(content, rng):
    """A copy of some bytes with one to three changes."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 16, 64))
        kind = rng.randrange(8)
        if kind == 0 and changed:
            changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = rng.randbytes(length)
        elif kind == 4:
            del changed[at:]
        elif kind == 5:
            changed += changed[at : at + length] or b"\0"
        elif kind == 6:
            source = rng.randrange(len(changed) + 1)
            changed[at : at + length] = changed[source : source + length]
        else:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) % 256**size
            changed[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(changed)


def damaged_copies(content, seed=0, rounds=ROUNDS):
    rng = random.Random(seed)
    for _ in range(rounds):
        yield damaged(content, rng)


STRANGE = (
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, -1e300, float("nan"), float("inf"), 2**31, 2**63,
    10**400, -(10**400), "", "x", "8", "8" * 5000, "\x1b[2J\n", [], {}, [[]], [1], [0, 0], [1, 2, 3], [8, 8],
    [None] * 3, ["a"], ["a"] * 3, {"0": "a"}, {"height": 8}, {"height": 0, "width": 1}, {"shortest_edge": 1e9},
    [1e300] * 3, [10**400] * 3, "nan" * 200,
)  # fmt: skip


def strange_copies(content, seed=0, rounds=ROUNDS):
    """Copies of an object of JSON, each with one to three values replaced, removed or added."""
    rng = random.Random(seed)
    for _ in range(rounds):
        copy = clone(content)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            parents = list(containers(copy))
            parent = rng.choice(parents)
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                continue
            key = rng.choice(keys)
            if rng.random() < 0.15:
                del parent[key]
            elif rng.random() < 0.1 and isinstance(parent, dict):
                parent[str(key) + rng.choice(("x", "0", "_"))] = parent.pop(key)
            else:
                parent[key] = clone(rng.choice(STRANGE))
        yield copy


def clone(value):
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, list) else value


def containers(value):
    """An object of JSON and the objects and lists in it."""
    yield value
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            yield from containers(item)
