"""Calls side by side in processes of their own, where one that crashes spoils no other."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

Arguments = tuple[Any, ...]


def side_by_side(
    call: Callable[..., Any],
    given: dict[str, Arguments],
    workers: int,
    deadline: float,
    ended: Callable[[str, str], Any],
) -> Iterator[tuple[str, Any]]:
    """The names of `given` with what `call`, a function of a module, returns; as they come.

    What has not come by the `deadline` (of `time.monotonic`) is left out. `ended(name, why)` stands
    for the result of a call whose process ended.
    """
    waiting: queue.SimpleQueue[tuple[str, Arguments]] = queue.SimpleQueue()
    for item in given.items():
        waiting.put(item)
    found: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def serve() -> None:
        child = None
        while time.monotonic() < deadline:
            try:
                name, arguments = waiting.get_nowait()
            except queue.Empty:
                break
            child = child or _Child(call)
            try:
                answer = child.ask(arguments, deadline)
            except (EOFError, OSError):
                why = child.stop()
                child = None
                found.put((name, ended(name, why)))
                continue
            if answer is None:
                break
            result, spoilt = answer
            found.put((name, result))
            if spoilt:
                child.stop()
                child = None
        if child is not None:
            child.stop()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(given)))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not found.empty():
        try:
            yield found.get(timeout=0.1)
        except queue.Empty:
            continue


def device_is_lost() -> bool:
    """Whether an error of a kernel, an illegal address say, has spoilt the process for a GPU."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Child:
    """A process that answers one call after another."""

    def __init__(self, call: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_answer, args=(there, call), daemon=True)
        self._process.start()
        # So that the pipe ends with the process.
        there.close()

    def ask(self, arguments: Arguments, deadline: float) -> tuple[Any, bool] | None:
        """The result, and whether the device is lost; None at the deadline."""
        self._pipe.send(arguments)
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            return None
        answer: tuple[Any, bool] = self._pipe.recv()
        return answer

    def stop(self) -> str:
        """End the process, and say how it ended where it had already."""
        self._process.join(0.5)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self._pipe.close()
        return f"its process ended with {code}"


def _answer(pipe: Connection, call: Callable[..., Any]) -> None:
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        pipe.send((call(*arguments), device_is_lost()))
