"""A web server for a folder, with byte ranges and with the faults of real stores."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """What was asked for."""

    name: str
    begin: int
    count: int
    """The how manieth request for these bytes this is, from 1."""


Fault = Callable[[Request], str | None]
"""What goes wrong: `drop` half-way, `stall`, `corrupt` a byte, `refuse` with 503, `short` by a byte, `forbid` (403)."""


@dataclass
class Store:
    """What the server does and has done."""

    folder: Path
    url: str = ""
    fault: Fault = lambda request: None
    requests: Counter[str] = field(default_factory=Counter)
    ranges: Counter[tuple[str, int]] = field(default_factory=Counter)
    bytes_sent: Counter[str] = field(default_factory=Counter)
    stall_seconds: float = 3.0


class StoreHandler(BaseHTTPRequestHandler):
    """Answers for a `store`, which `serve` sets."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_file(self.path.lstrip("/"), with_body=False)

    def do_GET(self) -> None:
        self.send_file(self.path.lstrip("/"), with_body=True)

    def send_file(self, name: str, *, with_body: bool) -> None:
        """Answer with a file of the folder, or the bytes of it that were asked for."""
        store = self.store
        store.requests[name] += 1
        given = self.headers.get("Range")
        first, last = (int(edge) for edge in given.removeprefix("bytes=").split("-")) if given else (0, None)
        store.ranges[name, first] += 1
        fault = store.fault(Request(name, first, store.ranges[name, first]))
        path = store.folder / name
        if fault in ("refuse", "forbid") or not path.is_file():
            self.send_response({"refuse": 503, "forbid": 403}.get(fault or "", 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = bytearray(path.read_bytes())
        begin, end = first, len(data) if last is None else min(last + 1, len(data))
        body = data[begin:end]
        store.bytes_sent[name] += len(body) if with_body else 0
        self.send_response(206 if given else 200)
        if fault == "corrupt":
            body[len(body) // 2] ^= 1
        if fault == "short":
            body = body[:-1]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if fault == "stall":
            time.sleep(store.stall_seconds)
        if with_body:
            self.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
        if fault == "drop":
            self.close_connection = True


@contextmanager
def serve(folder: Path, handler: type[StoreHandler] = StoreHandler) -> Iterator[Store]:
    """Serve `folder` on a free port while the block runs."""
    store = Store(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"store": store}))
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
