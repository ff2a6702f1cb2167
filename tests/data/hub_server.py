"""The part of the Hugging Face Hub's API that reading a dataset repository takes, for the files of a folder.

GET  /api/datasets/USER/NAME[/revision/main]          the repository
POST /api/datasets/USER/NAME/paths-info/main          sizes of files
GET  /api/datasets/USER/NAME/tree/main/FOLDER         files of a folder
GET  /datasets/USER/NAME/resolve/main/FILE            contents, with byte ranges
"""

import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.data.store_server import StoreHandler

REPOSITORY = "user/corpus"
_COMMIT = "0" * 40


class HubHandler(StoreHandler):
    """Answers for one dataset repository on the branch `main`."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        _, is_file, name = path.partition(f"/datasets/{REPOSITORY}/resolve/main/")
        if is_file:
            self.send_file(name, with_body=self.command == "GET")
        elif path in (f"/api/datasets/{REPOSITORY}", f"/api/datasets/{REPOSITORY}/revision/main"):
            self._send({"id": REPOSITORY, "sha": _COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0})
        elif path.startswith(tree := f"/api/datasets/{REPOSITORY}/tree/main/"):
            folder = path.removeprefix(tree)
            names = sorted(file.name for file in (self.store.folder / folder).iterdir())
            self._send([self._entry(f"{folder}/{name}") for name in names])
        else:
            self._send({"error": "not found"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        self._send([self._entry(name) for name in asked if (self.store.folder / name).is_file()])

    def _entry(self, name: str) -> dict[str, Any]:
        size = (self.store.folder / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": _COMMIT}

    def _send(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
