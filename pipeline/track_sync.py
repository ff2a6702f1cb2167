"""`python -m pipeline.track_sync RUN_DIR`: what `qsparse track sync` starts; one process, no ranks."""

import argparse
import sys
from pathlib import Path

from pipeline.run_directory import RunDirectory
from pipeline.tracking import replay


def main() -> int:
    """Deliver and say how much; exit code 1 if the store does not answer, 2 if it is no run directory."""
    parser = argparse.ArgumentParser(prog="qsparse track sync", description="Complete MLflow's copy of a run.")
    parser.add_argument("run_dir", type=Path, help="run directory")
    directory = RunDirectory(parser.parse_args().run_dir)
    try:
        sent = replay(directory)
    except ConnectionError as error:
        print(f"qsparse: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"qsparse: {error}", file=sys.stderr)
        return 2
    print(f"{directory.path}: {sent:,} values sent to MLflow" if sent else f"{directory.path}: MLflow has everything")
    return 0


if __name__ == "__main__":
    sys.exit(main())
