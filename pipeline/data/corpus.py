"""Step 1 of a preparation: inputs -> spools -> the documents that stay, as an array of places.

Everything here is kept in the work folder when it is finished and does not depend on the number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import numpy as np

from pipeline.data.dedup import SignatureTask, exact_duplicates, near_duplicates, signature_name, write_signatures
from pipeline.data.manifest import DedupRecord
from pipeline.data.options import PrepareOptions
from pipeline.data.parallel import run_tasks
from pipeline.data.plan import gather_documents
from pipeline.data.progress import StageProgress
from pipeline.data.sources import InputFile
from pipeline.data.spool import Omissions, Spool, TokenRange, plan_spools, spool_documents


class Corpus(NamedTuple):
    """What the sources hold."""

    documents: np.ndarray
    """[documents] PLACE_DTYPE, in the order of the sources."""
    omissions: Omissions
    dedup: DedupRecord | None


@dataclass(frozen=True)
class CorpusReader:
    """Reads sources into a work folder."""

    options: PrepareOptions
    inputs: Sequence[InputFile]
    work: Path
    workers: int
    stream: TextIO
    tokens: TokenRange | None = None
    """Given when the inputs hold tokens."""

    def read(self) -> Corpus:
        """Read everything, or up to `max_megabytes`, and leave out duplicates as the options say.

        Raises:
            DataError: An input cannot be read, or there is no document.
        """
        spools, limit = self._spools()
        documents = gather_documents([spool.documents for spool in spools], limit_bytes=limit)
        omissions = sum((spool.omissions for spool in spools), Omissions())
        if self.options.dedup == "none":
            return Corpus(documents, omissions, None)
        kept, record = self._remove_duplicates(documents, self.options.dedup)
        return Corpus(kept, omissions, record)

    def _spools(self) -> tuple[list[Spool], int | None]:
        """Spools in order; with a cap, reading stops when those finished without a gap hold enough."""
        cap = self.options.max_megabytes
        limit = None if cap is None else int(cap * 1e6)
        tasks = plan_spools(
            self.inputs, self.work, text_key=self.options.text_key, limit_bytes=limit, tokens=self.tokens
        )
        finished: dict[int, Spool] = {}
        complete = complete_bytes = 0
        with StageProgress(
            "read",
            total_bytes=limit or sum(file.bytes for file in self.inputs),
            measure="bytes" if limit else "input_bytes",
            stream=self.stream,
        ) as progress:
            for number, spool in run_tasks(spool_documents, tasks, workers=self.workers, report=progress.update):
                finished[number] = spool
                while complete in finished:
                    complete_bytes += int(finished[complete].documents["bytes"].sum())
                    complete += 1
                if limit is not None and complete_bytes >= limit:
                    break
        return [finished[number] for number in range(complete)], limit

    def _remove_duplicates(
        self, documents: np.ndarray, method: Literal["exact", "near"]
    ) -> tuple[np.ndarray, DedupRecord]:
        unique = documents[~exact_duplicates(documents)]
        kept = unique if method == "exact" else unique[~self._near_duplicates(unique)]
        record = DedupRecord(
            method=method,
            threshold=self.options.near_threshold if method == "near" else None,
            documents_read=len(documents),
            exact_removed=len(documents) - len(unique),
            near_removed=len(unique) - len(kept),
        )
        return kept, record

    def _near_duplicates(self, documents: np.ndarray) -> np.ndarray:
        spools = np.split(documents, np.flatnonzero(np.diff(documents["spool"])) + 1)
        tasks = [
            SignatureTask(self.work, places, self.work / signature_name(int(places["spool"][0])), bool(self.tokens))
            for places in spools
        ]
        paths: dict[int, Path] = {}
        total = int(documents["bytes"].sum())
        with StageProgress("minhash", total_bytes=total, stream=self.stream) as progress:
            for number, path in run_tasks(write_signatures, tasks, workers=self.workers, report=progress.update):
                paths[number] = path
        signatures = [np.load(paths[number], mmap_mode="r") for number in range(len(tasks))]
        return near_duplicates(signatures, threshold=self.options.near_threshold)
