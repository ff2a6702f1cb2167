"""A headless Chromium that takes pictures of pages that draw themselves late; Python's standard library only.

`chromium --headless --screenshot` stops the clock (`--virtual-time-budget`) and shows lazily loaded charts as
spinners.  This drives the browser in real time over the DevTools protocol instead, through a pair of pipes
(`--remote-debugging-pipe`: JSON messages that end in a NUL byte), so no port is open and no websocket package needed.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
)


class Browser:
    """One browser with one page.  Use it as a context manager.

    Args:
        width: Page width in CSS pixels.
        height: Page height in CSS pixels.
        scale: Device pixels per CSS pixel.
        program: Browser to start; absent: the first of chromium, google-chrome on PATH.

    Raises:
        ValueError: No browser is found.
    """

    def __init__(self, width: int, height: int, *, scale: float = 1.0, program: str | None = None) -> None:
        program = program or next((name for name in NAMES if shutil.which(name)), None)
        if program is None:
            raise ValueError(f"none of {', '.join(NAMES)} is installed; e.g. apt-get install chromium")
        self._profile = tempfile.TemporaryDirectory(prefix="screenshot-", ignore_cleanup_errors=True)
        commands_read, self._commands = os.pipe()
        self._answers, answers_write = os.pipe()
        # Chromium reads file descriptor 3 and writes 4; the shell puts ours there (not sh: dash knows one digit only).
        arguments = [
            program,
            *FLAGS.split(),
            f"--user-data-dir={self._profile.name}",
            f"--window-size={width},{height}",
        ]
        shell = ["bash", "-c", f'exec "$@" 3<&{commands_read} 4>&{answers_write}', "bash", *arguments, "about:blank"]
        inherited = (commands_read, answers_write)
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(shell, pass_fds=inherited, stdin=quiet, stdout=quiet, stderr=quiet)
        for descriptor in inherited:
            os.close(descriptor)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self._attach(width, height, scale)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._profile.cleanup()

    def open(self, url: str) -> None:
        """Navigate; returns before the page has drawn itself."""
        self.call("Page.navigate", url=url)

    def evaluate(self, javascript: str) -> Any:
        """Value of a JavaScript expression in the page; promises are awaited.

        Raises:
            RuntimeError: The expression throws.
        """
        result = self.call("Runtime.evaluate", expression=javascript, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"in the page: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, javascript: str, timeout_s: float) -> None:
        """Poll until a JavaScript expression is true.

        Raises:
            TimeoutError: It was not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(javascript):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true within {timeout_s:.0f} s: {javascript}")
            time.sleep(0.25)

    def save(self, path: Path) -> None:
        """Write what the page shows now as a PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result.

        Raises:
            RuntimeError: The browser refuses the command or is gone.
        """
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _attach(self, width: int, height: int, scale: float) -> None:
        targets = self.call("Target.getTargets")["targetInfos"]
        pages = [target for target in targets if target["type"] == "page"]
        target = pages[0]["targetId"] if pages else self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.enable")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer
