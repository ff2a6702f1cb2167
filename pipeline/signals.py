"""Stop requests: the first SIGTERM, SIGUSR1 or SIGUSR2 asks the run to save and end after the step in flight."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers that a stop signal arrived; used as a context manager, it restores the handlers at the end.

    Ranks receive signals at different steps: the trainer shares the flag before it acts on it.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
