"""An independent reader of prepared datasets: tarfile and numpy, nothing of pipeline.data."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np


def read_chunks(folder: Path, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, doclens) of every chunk of a split, in order."""
    records = json.loads((folder / "dataset.json").read_text())["splits"][split]
    chunks = []
    for record in records:
        with tarfile.open(folder / record["name"]) as tar:
            arrays = {member.name: np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar}
        keys = [name.removesuffix(".tokens.npy") for name in arrays if name.endswith(".tokens.npy")]
        chunks += [(arrays[f"{key}.tokens.npy"], arrays[f"{key}.doclens.npy"]) for key in keys]
    return chunks


def read_documents(folder: Path, split: str) -> list[np.ndarray]:
    """Token ids of every document, EOD included, joined over chunks."""
    eod = json.loads((folder / "dataset.json").read_text())["eod_id"]
    documents: list[np.ndarray] = []
    part: list[np.ndarray] = []
    for tokens, doclens in read_chunks(folder, split):
        for piece in np.split(tokens, np.cumsum(doclens)[:-1]):
            part.append(piece)
            if piece[-1] == eod:
                documents.append(np.concatenate(part))
                part = []
    assert not part
    return documents


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
