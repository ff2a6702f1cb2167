"""s3://, gs://, hf:// and http:// with the clients that users have, against real servers on this machine."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from pipeline.data.loader import SourceFiles
from pipeline.data.manifest import DatasetManifest
from pipeline.data.shards import ShardIndex
from tests.data.hub_server import REPOSITORY, HubHandler
from tests.data.remote_reader import windows_hash
from tests.data.store_server import serve
from tests.testing import ROOT

Corpus = tuple[Path, DatasetManifest]
Environment = dict[str, str]


@contextmanager
def s3(folder: Path) -> Iterator[tuple[str, Environment]]:
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        files = S3FileSystem(key="test", secret="test", endpoint_url=endpoint, skip_instance_cache=True)
        if not files.exists("bucket"):
            files.mkdir("bucket")
        files.put(f"{folder}/", "bucket/datasets", recursive=True)
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        yield "s3://bucket/datasets", {"AWS_ENDPOINT_URL": endpoint, **keys}
    finally:
        server.stop()


@contextmanager
def gs(folder: Path) -> Iterator[tuple[str, Environment]]:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server._api._httpd.server_port}"
        for path in filter(Path.is_file, folder.rglob("*")):
            name = quote(f"datasets/{path.relative_to(folder)}", safe="")
            url = f"{endpoint}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
            urlopen(Request(url, path.read_bytes(), {"Content-Type": "application/octet-stream"})).close()
        # Without the emulator's environment gcsfs would look for a metadata server and for hierarchical buckets.
        quick = {"NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        yield "gs://bucket/datasets", {"STORAGE_EMULATOR_HOST": endpoint, **quick}
    finally:
        server.stop()


@contextmanager
def hf(folder: Path) -> Iterator[tuple[str, Environment]]:
    with serve(folder, HubHandler) as hub:
        yield f"hf://datasets/{REPOSITORY}", {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextmanager
def http(folder: Path) -> Iterator[tuple[str, Environment]]:
    with serve(folder) as store:
        yield store.url, {}


STORES = {s3: "moto s3fs", gs: "gcp_storage_emulator gcsfs", hf: "huggingface_hub", http: "aiohttp"}


@pytest.fixture(params=STORES, ids=lambda store: store.__name__)
def store(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    missing = [name for name in STORES[request.param].split() if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"NOT TESTED: {request.param.__name__}:// needs {', '.join(missing)}")
    return request.param


def read(address: str, environment: Environment, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.data.remote_reader", address, str(cache)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.fixture
def folder(corpus: Corpus, tmp_path: Path) -> Path:
    """Two datasets, `sound` and `damaged`."""
    sound, damaged = (Path(shutil.copytree(corpus[0], tmp_path / "datasets" / name)) for name in ("sound", "damaged"))
    data = bytearray((sound / "train-00000.tar").read_bytes())
    data[second_chunk(sound) + 100] ^= 1
    (damaged / "train-00000.tar").write_bytes(data)
    (damaged / "train-00001.tar").unlink()
    return tmp_path / "datasets"


def second_chunk(dataset: Path) -> int:
    return int(ShardIndex.load(dataset / "train-00000.tar.idx.npz").chunks["offset"][1])


def test_reading_and_verifying(corpus: Corpus, folder: Path, store: Callable, tmp_path: Path) -> None:
    with store(folder) as (address, environment):
        sound, damaged = (read(f"{address}/{name}", environment, tmp_path / "cache") for name in ("sound", "damaged"))
    assert sound.returncode == 0, sound.stderr
    assert json.loads(sound.stdout.splitlines()[-1]) == {"codes": [0, 0], "hash": windows_hash(SourceFiles(corpus[0]))}
    assert f"{address}/sound: no problems" in sound.stdout
    assert f"{sum(record.tokens for record in corpus[1].splits['train']):,}" in sound.stdout
    assert '"stage": "verify", "finished": true' in sound.stderr
    member = f"member 00000-00001.tokens.npy at byte {second_chunk(folder / 'sound')}"
    assert f"{address}/damaged/train-00000.tar: {member}: crc32 is " in damaged.stdout
    assert f"{address}/damaged/train-00001.tar: missing shard, dataset.json lists it with " in damaged.stdout
    assert not list((tmp_path / "cache").glob("verify-*")), "what was downloaded is gone"


def test_the_hub_is_asked_for_no_byte_too_many(corpus: Corpus, tmp_path: Path) -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("NOT TESTED: hf:// needs huggingface_hub")
    with serve(corpus[0].parent, HubHandler) as server:
        fetch = "from pipeline.data.remote import RemoteFolder, RemoteOptions; import sys; "
        fetch += "print(len(RemoteFolder(sys.argv[1], RemoteOptions()).fetch('train-00000.tar', 1000, 500)))"
        command = [sys.executable, "-c", fetch, f"hf://datasets/{REPOSITORY}/{corpus[0].name}"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_ENDPOINT": server.url}
        )
    assert done.stdout == "500\n", done.stderr
    assert server.bytes_sent == {f"{corpus[0].name}/train-00000.tar": 500}
