"""Read ahead in threads, in order.

Threads are enough: pread, crc32 and NumPy's copies release the GIL, and handing windows between processes would cost
more than reading them.  What is read does not depend on the threads, only when.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class Prefetcher(Generic[Request, Result]):
    """An iterator over `read(request)`; an error of a read is raised in its place.

    Args:
        read: may be called by several threads at once.
        requests: taken in order; may be endless.
        threads: 0 reads when asked.
        depth: requests read ahead at most.
    """

    def __init__(
        self, read: Callable[[Request], Result], requests: Iterator[Request], *, threads: int, depth: int
    ) -> None:
        self._read, self._requests, self._depth = read, requests, depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch") if threads else None
        self._ready: deque[Future[Result]] = deque()

    def __iter__(self) -> "Prefetcher[Request, Result]":
        return self

    def __next__(self) -> Result:
        """The next result."""
        if self._pool is None:
            return self._read(next(self._requests))
        self._fill(self._depth)  # one that is due and what comes after it
        if not self._ready:
            raise StopIteration
        due = self._ready.popleft()
        self._fill(self._depth)
        return due.result()

    def close(self) -> None:
        """Drop what is ahead and wait for the reads that have begun."""
        self._requests = iter(())
        self._ready.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _fill(self, depth: int) -> None:
        assert self._pool is not None
        while len(self._ready) < depth:
            try:
                request = next(self._requests)
            except StopIteration:
                return
            self._ready.append(self._pool.submit(self._read, request))
