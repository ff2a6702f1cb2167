"""Start runs one after another in one set of processes, each through the real entry; run it with torchrun.

Importing torch and megatron-core takes longer than these runs.  Arguments: the configuration, its run.root, a JSON list
of starts and a JSON file for what became of them.  A start is {"name", "nproc", "port", "overrides", "before"}: the
first `nproc` processes take part, the others go on to their next start and wait for its rank 0; a port of its own,
because every start builds its process groups anew; and what rank 0 does before it, a function of `tests.resume.recipe`
and its arguments, or null.
"""

import io
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from pipeline.run_entry import run_ranks
from pipeline.train import train
from tests.resume import recipe


def start(
    config: Path, root: Path, *, name: str, nproc: int, port: int, overrides: list[str], before: list[Any] | None
) -> dict[str, Any] | None:
    """Exit code and output of one start on this rank; None if it has no part in it."""
    rank = int(os.environ["RANK"])
    if rank >= nproc:
        return None
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    os.environ.update(address, WORLD_SIZE=str(nproc))
    if before and rank == 0:
        getattr(recipe, before[0])(root, *before[1:], name)
    output, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            run_ranks(lambda: train(config, [f"run.name={name}", *overrides]))
        except SystemExit as ending:
            code = ending.code
        except Exception:
            traceback.print_exc()
            code = "traceback"
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}


def main(config: Path, root: Path, starts: Path, results: Path) -> None:
    found = [start(config, root, **arguments) for arguments in json.loads(starts.read_text())]
    results.with_name(f"{results.name}.{os.environ['RANK']}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
