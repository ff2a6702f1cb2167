"""What a user does with an address, in a process of its own, as clients read the environment when they are imported.

python -m tests.data.remote_reader ADDRESS CACHE    `verify` and `info`, then one JSON line with a hash of windows
"""

import hashlib
import json
import sys
from pathlib import Path

from pipeline.data import commands
from pipeline.data.loader import SourceFiles, WindowDataset
from pipeline.data.phases import Phase
from pipeline.data.remote import RemoteOptions

SAMPLES = 400


def windows_hash(files: SourceFiles) -> str:
    """sha256 of the first windows."""
    dataset = WindowDataset([files], "train", phases=[Phase(0, 0, (1.0,), 64, 8)])
    return hashlib.sha256(dataset.windows(range(SAMPLES)).tobytes()).hexdigest()


def main(address: str, cache: str) -> None:
    codes = [commands.main([command, address, "--cache", cache]) for command in ("verify", "info")]
    files = SourceFiles(address, RemoteOptions(cache=Path(cache), retries=1))
    print(json.dumps({"codes": codes, "hash": windows_hash(files)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
