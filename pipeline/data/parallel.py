"""A task pool for preparation: spawned processes, a pipe to each, results as they finish.

`concurrent.futures` would do the work but not the deaths: when the parent is killed its workers wait for ever, since
each holds both ends of the queue.  Here a worker owns one end of one pipe, so a killed parent ends it at the next
send or receive, and a killed worker (out of memory) is an EOF that the parent reports.  No locks, no shared memory.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar, cast

from pipeline.data.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Counts(NamedTuple):
    """Progress since the last report."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of text, decompressed."""
    input_bytes: int = 0
    """Of the input files as they lie on the disk."""
    padding: int = 0
    """Tokens that packing added."""


Report = Callable[[Counts], None]


def run_tasks(
    function: Callable[[Task, Report], Result], tasks: Sequence[Task], *, workers: int, report: Report
) -> Iterator[tuple[int, Result]]:
    """Run `function(task, report)` for every task; yield `(task number, result)` in order of completion.

    Args:
        function: Importable top-level function, or a picklable object, which each process gets once and keeps.
        tasks: Picklable tasks; started in order.
        workers: Processes; 1 runs in this process.
        report: Called here with the progress that tasks report.

    Raises:
        DataError: Raised by a task, or a worker process died.
        OSError: Raised by a task, such as a full disk.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        for number, task in enumerate(tasks):
            yield number, function(task, report)
        return
    pool = _Pool(function, workers)
    try:
        yield from pool.run(tasks, report)
    finally:
        pool.close()


class _Pool:
    def __init__(self, function: Callable[[Any, Report], Any], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(function, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, tasks: Sequence[Any], report: Report) -> Iterator[tuple[int, Any]]:
        waiting = iter(enumerate(tasks))
        busy: dict[Connection, int] = {}
        for pipe in self._processes:
            self._give(pipe, waiting, busy)
        while busy:
            for ready in wait(list(busy)):
                pipe = cast(Connection, ready)
                kind, payload = self._receive(pipe)
                if kind == "progress":
                    report(payload)
                elif kind == "error":
                    raise payload
                else:
                    number = busy.pop(pipe)
                    self._give(pipe, waiting, busy)
                    yield number, payload

    def _give(self, pipe: Connection, waiting: Iterator[tuple[int, Any]], busy: dict[Connection, int]) -> None:
        following = next(waiting, None)
        if following is not None:
            busy[pipe] = following[0]
            pipe.send(following[1])

    def _receive(self, pipe: Connection) -> tuple[str, Any]:
        try:
            return cast(tuple[str, Any], pipe.recv())
        except (EOFError, ConnectionResetError):
            process = self._processes[pipe]
            process.join(timeout=5)
            raise DataError(
                f"worker process {process.pid} died with exit code {process.exitcode} (-9: killed, often for memory); "
                "run the same command again to continue, with fewer --workers if memory was short"
            ) from None

    def close(self) -> None:
        for pipe, process in self._processes.items():
            pipe.close()
            process.terminate()
            process.join()


def _work(function: Callable[[Any, Report], Any], pipe: Connection) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    try:
        while True:
            task = pipe.recv()
            try:
                result = function(task, lambda counts: pipe.send(("progress", counts)))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except (DataError, OSError) as error:
                pipe.send(("error", error))
            else:
                pipe.send(("result", result))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return  # the parent is gone, or is about to end us
