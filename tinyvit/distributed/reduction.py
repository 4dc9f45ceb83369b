"""Sums over the shards of a batch, in an order that does not depend on how many processes share them.

The gradients of the shards 0 ... S - 1 are added up along one binary tree: ((0 + 1) + (2 + 3)) + .... Each of P
processes has S / P neighbouring shards and adds up the parts of the tree that lie within them. The rest is added up by
slices: every process gets one slice of all others' sums, adds these along the tree, and sends the result back. So each
number travels twice, as in any good all-reduce, and the bits are those of one process with S shards. MPI's own
reductions may add in another order when the number of processes, the size of the message or the network changes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

BUCKET = 1 << 22  # bytes that are sent together, about: the first buckets travel while the backward pass goes on


def _middle(first: int, last: int) -> int:
    return first + (last - first + 1) // 2


def tree_sum(first: int, last: int, known: Callable[[int, int], T | None], add: Callable[[T, T], T]) -> T:
    """The sum along the tree over first ... last - 1.

    `known` gives the sum over a part of it, None where its halves have to be added. It is asked from left to right.
    """
    if (value := known(first, last)) is not None:
        return value
    middle = _middle(first, last)
    left = tree_sum(first, middle, known, add)
    return add(left, tree_sum(middle, last, known, add))


def sum_in_order(values: Iterable[T], count: int, add: Callable[[T, T], T]) -> T:
    """The sum of `count` values along the tree, each of which is taken when it is needed."""
    iterator = iter(values)
    return tree_sum(0, count, lambda first, last: next(iterator) if last - first == 1 else None, add)


def parts_within(first: int, last: int, start: int, stop: int) -> list[tuple[int, int]]:
    """The largest parts of the tree over first ... last - 1 that lie within start ... stop - 1."""
    if start <= first and last <= stop:
        return [(first, last)]
    if last <= start or stop <= first:
        return []
    middle = _middle(first, last)
    return parts_within(first, middle, start, stop) + parts_within(middle, last, start, stop)


class Reduction:
    """Adds up arrays over all shards of all processes, a bucket at a time, while others are still being computed.

    Args:
        group: the processes, of `processes.Processes`.
        like: NumPy arrays of one dtype and of the shapes to be added up.
        shards: how many there are in all processes together.
    """

    def __init__(self, group: Any, like: Sequence[np.ndarray], shards: int) -> None:
        self.group, self.shapes = group, [x.shape for x in like]
        bounds = [shards * rank // group.size for rank in range(group.size + 1)]
        self.first, self.last = bounds[group.rank : group.rank + 2]
        parts = [parts_within(0, shards, *pair) for pair in itertools.pairwise(bounds)]
        dtype = np.result_type(*like)
        self._lock = threading.Lock()
        self._bucket_of: dict[int, _Bucket] = {}
        numbers: list[int] = []
        self._buckets: list[_Bucket] = []
        for number in reversed(range(len(like))):  # the backward pass finds the last gradients first
            numbers.append(number)
            if sum(like[n].nbytes for n in numbers) >= BUCKET or number == 0:
                bucket = _Bucket(group, len(self._buckets), parts, {n: like[n].size for n in numbers}, dtype)
                self._buckets.append(bucket)
                self._bucket_of |= dict.fromkeys(numbers, bucket)
                numbers = []

    def begin(self) -> None:
        """Forget what a step gave that broke off."""
        for bucket in self._buckets:
            bucket.given = {}

    def add(self, shard: int, number: int, array: np.ndarray) -> None:
        """Take array `number` of a shard of this process; it must not change before `finish`. For any thread."""
        bucket = self._bucket_of[number]
        with self._lock:
            bucket.given[shard, number] = array
            if len(bucket.given) < len(bucket.places) * (self.last - self.first):
                return
        bucket.add_up()
        with self._lock:
            bucket.start()
            self._advance()

    def _advance(self) -> set[int]:
        """Go on with what has arrived. Returns the processes that a bucket waits for."""
        return set().union(*(bucket.advance() for bucket in self._buckets))

    def finish(self) -> list[np.ndarray]:
        """The sums, in memory that the next ones will be written into. Raises DistributedError, Failed."""
        self.group.wait(self._advance)
        return [self._bucket_of[n].array(n).reshape(shape) for n, shape in enumerate(self.shapes)]


class _Bucket:
    """Arrays that are sent together, one after the other in `sums` (parts of the tree of this process, elements)."""

    def __init__(
        self, group: Any, number: int, parts: list[list[tuple[int, int]]], sizes: dict[int, int], dtype: np.dtype
    ) -> None:
        self.group, self.number, self.parts = group, number, parts
        ends = list(itertools.accumulate(sizes.values()))
        self.places = {n: slice(end - size, end) for (n, size), end in zip(sizes.items(), ends, strict=True)}
        self.sums = np.empty((len(parts[group.rank]), ends[-1]), dtype)
        bounds = [ends[-1] * rank // group.size for rank in range(group.size + 1)]
        self.slices = [slice(*pair) for pair in itertools.pairwise(bounds)]
        mine = self.slices[group.rank]
        self.others = [rank for rank in range(group.size) if rank != group.rank]
        self.received = {rank: np.empty((len(parts[rank]), mine.stop - mine.start), dtype) for rank in self.others}
        self.given: dict[tuple[int, int], np.ndarray] = {}
        self.requests: dict[int, list[Any]] = {}  # by rank: what is on its way, and must be there to go on
        self.then: Callable[[], None] | None = None

    def array(self, number: int) -> np.ndarray:
        return self.sums[0, self.places[number]]

    def add_up(self) -> None:
        """Add up what this process's shards gave."""
        for row, (first, last) in zip(self.sums, self.parts[self.group.rank], strict=True):
            for number, place in self.places.items():
                shards = (self.given[shard, number].ravel() for shard in range(first, last))
                if last - first == 1:
                    row[place] = next(shards)
                else:
                    middle = _middle(first, last)
                    left = sum_in_order(shards, middle - first, np.add)
                    np.add(left, sum_in_order(shards, last - middle, np.add), out=row[place])
        self.given = {}

    def start(self) -> None:
        """Send the others their slices of the sums, and receive theirs of this process's slice."""
        slices = {rank: np.ascontiguousarray(self.sums[:, self.slices[rank]]) for rank in self.others}
        self._swap(slices, self.received, 2 * self.number)
        self.then = self._share

    def _swap(self, outgoing: Mapping[int, np.ndarray], incoming: Mapping[int, np.ndarray], tag: int) -> None:
        """Begin to send and to receive these arrays, by rank."""
        self.requests = {
            rank: [self.group.send(outgoing[rank], rank, tag), self.group.receive(incoming[rank], rank, tag)]
            for rank in self.others
        }

    def _share(self) -> None:
        """Add up this process's slice, send it to the others, and receive theirs."""
        mine = self.slices[self.group.rank]
        rows = {self.group.rank: self.sums[:, mine], **self.received}
        known = dict(zip(itertools.chain(*self.parts), itertools.chain(*(rows[r] for r in sorted(rows))), strict=True))
        total = tree_sum(0, self.parts[-1][-1][1], lambda *part: known.get(part), np.add)
        self.sums[0, mine] = total
        slices = {rank: self.sums[0, self.slices[rank]] for rank in self.others}
        self._swap(dict.fromkeys(self.others, self.sums[0, mine]), slices, 2 * self.number + 1)
        self.then = None

    def advance(self) -> set[int]:
        """Go on if everything has arrived. Returns the processes that it waits for."""
        while True:
            left = {rank: [x for x in requests if not x.Test()] for rank, requests in self.requests.items()}
            self.requests = {rank: requests for rank, requests in left.items() if requests}
            if self.requests or self.then is None:
                return set(self.requests)
            self.then()
