"""One set of synthetic documents in the format of every loader that is measured.

    chunks/    our dataset: shards of chunks, dataset.json      (also read by the stock webdataset)
    webdataset/  one .npy member per document
    energon/   hard links to the shards of chunks, and energon's own index
    megatron/  .bin and .idx
    mds/       MosaicML: samples of seq_length + 1 tokens, as llm-foundry stores them
    flat.bin   tokens, one after the other

Lengths are log-normal with the quantiles of real text (median 1,900 tokens, 10% above 7,300); ids are uniform, as no
loader looks at them.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import DatasetManifest, ShardRecord, TokenizerRecord
from pipeline.data.megatron_format import MegatronWriter
from pipeline.data.shards import ShardWriter, index_path

VOCAB_SIZE = 50_257
EOD = 0
DTYPE = np.dtype("<u2")
_CHUNK_TOKENS = 2**20
_SHARD_TOKENS = 2**23
_MEDIAN_LENGTH, _SIGMA = 1900, 1.05

Tokens = npt.NDArray[np.uint16]


def make_documents(num_tokens: int, seed: int = 0) -> list[Tokens]:
    """Documents of about `num_tokens` tokens, EOD included."""
    generator = np.random.default_rng(seed)
    documents, total = [], 0
    while total < num_tokens:
        length = int(np.clip(generator.lognormal(np.log(_MEDIAN_LENGTH), _SIGMA), 2, _CHUNK_TOKENS // 4))
        document = generator.integers(1, VOCAB_SIZE, length, dtype=np.uint16)
        document[-1] = EOD
        documents.append(document)
        total += length
    return documents


def write_all(folder: Path, documents: list[Tokens], seq_length: int) -> dict[str, str]:
    """Write every format that can be written here.

    Returns:
        Formats that cannot, and why.
    """
    flat = np.concatenate(documents)
    flat.tofile(folder / "flat.bin")
    write_chunks(folder / "chunks", documents)
    _write_webdataset(folder / "webdataset", documents)
    _write_megatron(folder / "megatron", documents)
    missing = {}
    optional: dict[str, Callable[[], None]] = {
        "energon": lambda: _write_energon(folder / "energon", folder / "chunks"),
        "mds": lambda: _write_mds(folder / "mds", flat, seq_length),
    }
    for name, write in optional.items():
        try:
            write()
        except ImportError as error:
            missing[name] = f"not installed ({error.name})"
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            missing[name] = f"cannot be written: {str(error).splitlines()[0][:100]}"
    return missing


def write_chunks(folder: Path, documents: list[Tokens]) -> None:
    """Our own format: shards of chunks of whole documents."""
    folder.mkdir()
    records = []
    for number, shard in enumerate(_groups(documents, _SHARD_TOKENS)):
        name = f"train-{number:05d}.tar"
        with (folder / name).open("wb") as file:
            writer = ShardWriter(file, shard_number=number, dtype=DTYPE)
            for chunk in _groups(shard, _CHUNK_TOKENS):
                lengths = np.array([len(document) for document in chunk])
                writer.add_chunk(np.concatenate(chunk), lengths, documents=len(chunk))
            index = writer.finish(task="benchmark")
        index.save(index_path(folder / name))
        records.append(
            ShardRecord(
                name=name,
                tokens=index.tokens,
                documents=index.documents,
                chunks=len(index.chunks),
                bytes=index.bytes,
                sha256=index.sha256,
            )
        )
    DatasetManifest(
        tokenizer=TokenizerRecord(sha256="0" * 64, name="none", encoder="tokenizers"),
        vocab_size=VOCAB_SIZE,
        dtype="uint16",
        eod_id=EOD,
        chunk_tokens=_CHUNK_TOKENS,
        splits={"train": tuple(records)},
        source=("synthetic",),
        command="qsparse bench data",
        seed=0,
        request="benchmark",
    ).save(folder)


def _groups(documents: list[Tokens], num_tokens: int) -> Iterator[list[Tokens]]:
    group: list[Tokens] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= num_tokens:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_webdataset(folder: Path, documents: list[Tokens]) -> None:
    folder.mkdir()
    for number, shard in enumerate(_groups(documents, _SHARD_TOKENS)):
        with tarfile.open(folder / f"train-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, document in enumerate(shard):
                data = io.BytesIO()
                np.save(data, document)
                member = tarfile.TarInfo(f"{number:05d}-{key:06d}.tokens.npy")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)


def _write_megatron(folder: Path, documents: list[Tokens]) -> None:
    folder.mkdir()
    with (folder / "train.bin").open("wb") as file, (folder / "train.idx").open("wb") as index:
        writer = MegatronWriter(file, dtype=DTYPE)
        for document in documents:
            writer.add_document(document)
        writer.write_index(index)


def _write_energon(folder: Path, chunks: Path) -> None:
    import megatron.energon  # noqa: F401

    folder.mkdir()
    for shard in chunks.glob("*.tar"):
        os.link(shard, folder / shard.name)
    arguments = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    command = Path(sys.executable).with_name("energon")
    subprocess.run([str(command), "prepare", *arguments, str(folder)], check=True, capture_output=True, text=True)


def _write_mds(folder: Path, flat: Tokens, seq_length: int) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": "bytes"}, size_limit=2**26) as writer:
        for begin in range(0, len(flat) - seq_length, seq_length):
            writer.write({"tokens": flat[begin : begin + seq_length + 1].tobytes()})


def describe(folder: Path) -> str:
    """One line about the corpus of `write_chunks`."""
    record = json.loads((folder / "chunks" / "dataset.json").read_text())["splits"]["train"]
    tokens, documents = (sum(shard[key] for shard in record) for key in ("tokens", "documents"))
    return f"{tokens:,} tokens, {documents:,} documents, {len(record)} shards"
