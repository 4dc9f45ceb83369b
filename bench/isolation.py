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
    """A contender elsewhere; it does what a `Peer` does."""

    connection: Connection

    def run(self, kind: str, repeats: int = 1) -> None:
        self._ask("run", kind, repeats)

    def loss(self) -> float:
        return self._ask("loss")

    def gradients(self) -> Any:
        return self._ask("gradients")

    def _ask(self, *question: Any) -> Any:
        self.connection.send(question)
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError("its process ended before it answered") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def start(build: Callable[..., Peer], *arguments: Any) -> Isolated:
    """The contender that `build(*arguments)` makes, in a new process; that ends when the contender is dropped."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, build, *arguments), daemon=True).start()
    theirs.close()
    peer = Isolated(ours)
    peer._ask()  # waits until it is built
    return peer


def _serve(connection: Connection, build: Callable[..., Peer], *arguments: Any) -> None:
    peer = None
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            peer = peer or build(*arguments)
            connection.send(getattr(peer, question[0])(*question[1:]) if question else None)
        except Exception as problem:
            connection.send(RuntimeError(f"{type(problem).__name__}: {problem}"))
