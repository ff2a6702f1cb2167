"""Start runs one after another in one set of processes, each through the real entry; run it with torchrun.

Importing torch and megatron-core takes longer than these runs.  Arguments: the configuration, its run.root, a JSON list
of starts and a JSON file for what became of them.  A start is {"name", "port", "overrides", "kill"}: a port of its own,
because every start builds its process groups anew, and if it resumes a killed run, that run and the step of its last
checkpoint, else null.
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
from tests.resume.recipe import kill_after_checkpoint


def start(
    config: Path, root: Path, *, name: str, port: int, overrides: list[str], kill: list[Any] | None
) -> dict[str, Any]:
    """Exit code and output of one start on this rank."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
    if kill and os.environ["RANK"] == "0":
        kill_after_checkpoint(root, *kill, name)
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
