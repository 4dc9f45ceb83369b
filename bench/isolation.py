"""Contenders in processes of their own, so that the threads of one library do not slow another's down."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from peers import Peer


@dataclass
class Isolated:
    """A contender in another process, with a `Peer`'s methods."""

    connection: Connection

    def run(self, kind: str, repeats: int = 1) -> None:
        self._call("run", kind, repeats)

    def loss(self) -> float:
        return self._call("loss")

    def gradients(self) -> Any:
        return self._call("gradients")

    def _call(self, *call: Any) -> Any:
        """The result of the method `call[0]` with the arguments `call[1:]`; None without a call."""
        self.connection.send(call)
        try:
            result = self.connection.recv()
        except EOFError:
            raise RuntimeError("its process ended before it answered") from None
        if isinstance(result, Exception):
            raise result
        return result


def start(build: Callable[..., Peer], *arguments: Any) -> Isolated:
    """The contender that `build(*arguments)` makes, in a new process, which ends when the contender is dropped."""
    here, there = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=_serve, args=(there, build, *arguments), daemon=True).start()
    there.close()
    peer = Isolated(here)
    peer._call()  # waits until it is built
    return peer


def _serve(connection: Connection, build: Callable[..., Peer], *arguments: Any) -> None:
    peer = None
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        try:
            peer = peer or build(*arguments)
            connection.send(getattr(peer, call[0])(*call[1:]) if call else None)
        except Exception as problem:
            connection.send(RuntimeError(f"{type(problem).__name__}: {problem}"))
