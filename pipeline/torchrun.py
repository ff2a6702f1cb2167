"""torchrun that ends as its ranks ended: `python -m pipeline.torchrun` takes torchrun's arguments.

When a rank fails, torchrun prints a traceback of itself and a banner, and exits with 1 whatever the rank's exit code
was.  The rank has said what is wrong, or shown its own traceback; so this passes the first failure's exit code on, and
speaks only of what no rank can tell: that a signal ended it.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Run torchrun; returns the exit code of the first rank that failed, 128 + n if signal n ended it, else 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        number = -failure.exitcode
        memory = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
        print(f"error: rank {rank} was ended by {signal.Signals(number).name}{memory}", file=sys.stderr, flush=True)
        return 128 + number
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
