"""Take a picture of MLflow's own pages: `python docs/screenshots/mlflow_page.py STORE OUT.png`.

STORE is an SQLite file (runs/mlflow.db), for which a server is started and stopped, or the address of a running
server.  Needs chromium (apt-get install chromium) and the installed project; not part of CI.

    python docs/screenshots/mlflow_page.py runs/mlflow.db docs/images/charts.png
    python docs/screenshots/mlflow_page.py runs/mlflow.db docs/images/run.png --page run --runs qsparse
    python docs/screenshots/mlflow_page.py runs/mlflow.db docs/images/compare.png --page compare --runs dense qsparse

Pages: `charts` (chart view of the experiment), `table` (its runs), `run` (overview of one run), `run-charts` (its
metrics), `compare` (several runs).  Runs are given by name; the latest of that name counts.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import Browser

# The page has text and no spinner in sight; charts below the fold load only when scrolled to.
READY = """
document.body?.innerText.length > 200 && [...document.querySelectorAll('[class*=skeleton], [class*=spin]')].every(e => {
  const box = e.getBoundingClientRect();
  return box.width === 0 || box.bottom < 0 || box.top > innerHeight;
})
"""
# MLflow opens for language-model applications, with an assistant beside the page: take the view of training runs.
SETTINGS = """
localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
"""
# Without a mouse the hover toolbar of every chart is shown, over the chart.
STYLE = """
document.head.appendChild(document.createElement('style')).textContent = '.modebar { display: none !important; }'
"""
SCROLL = """
(section => {
  const titles = [...document.querySelectorAll('main *, #root *')].filter(e => e.innerText && (
    e.innerText.trim() === section || new RegExp('^' + section + ' [(][0-9]+[)]$').test(e.innerText.trim())));
  titles.forEach(e => { e.style.scrollMarginTop = '70px'; });  // below the search field, which stays on top
  titles.at(-1)?.scrollIntoView();
  return titles.length > 0;
})(%s)
"""
PAGES = ("charts", "table", "run", "run-charts", "compare")


def main() -> None:
    """Parse the command line and take one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="SQLite file of the store, or http://HOST:PORT of a running server")
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--experiment", default="qsparse")
    parser.add_argument("--page", choices=PAGES, default="charts")
    parser.add_argument("--runs", nargs="*", default=[], help="run names, for the pages run, run-charts and compare")
    parser.add_argument("--section", help="scroll to this section of charts, e.g. train")
    parser.add_argument("--size", default="1600x1200", help="WIDTHxHEIGHT in CSS pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels per CSS pixel")
    parser.add_argument("--settle", type=float, default=5.0, help="seconds after the page is ready, for animations")
    parser.add_argument("--script", default="", help="JavaScript to evaluate before the picture, e.g. a click")
    arguments = parser.parse_args()
    width, height = (int(part) for part in arguments.size.split("x"))
    with serving(arguments.store) as address, Browser(width, height, scale=arguments.scale) as browser:
        experiment, runs = find(address, arguments.experiment, arguments.runs)
        browser.call("Page.addScriptToEvaluateOnNewDocument", source=SETTINGS)
        browser.open(page_url(address, arguments.page, experiment, runs))
        browser.wait_for(READY, timeout_s=60)
        browser.evaluate(STYLE)
        if arguments.section:
            scroll_to(browser, arguments.section)
        if arguments.script:
            browser.evaluate(arguments.script)
        time.sleep(arguments.settle)
        browser.wait_for(READY, timeout_s=60)
        browser.save(arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


def scroll_to(browser: Browser, section: str) -> None:
    """Scroll to a section of charts, once the page has it.

    Raises:
        ValueError: The page does not get such a section.
    """
    try:
        browser.wait_for(SCROLL % json.dumps(section), timeout_s=30)
    except TimeoutError:
        raise ValueError(f"--section {section}: the page has no section of that name") from None


def page_url(address: str, page: str, experiment: str, runs: list[str]) -> str:
    """Address of one of MLflow's pages.

    Raises:
        ValueError: The page is about runs and none is given.
    """
    if page in ("run", "run-charts", "compare") and not runs:
        raise ValueError(f"--page {page} needs --runs NAME ...")
    paths = {
        "charts": f"/experiments/{experiment}/runs?compareRunsMode=CHART",
        "table": f"/experiments/{experiment}/runs",
        "run": f"/experiments/{experiment}/runs/{runs[0] if runs else ''}",
        "run-charts": f"/experiments/{experiment}/runs/{runs[0] if runs else ''}/model-metrics",
        "compare": f"/compare-runs?runs={json.dumps(runs)}&experiments={json.dumps([experiment])}",
    }
    return f"{address}/#{paths[page]}"


def find(address: str, experiment: str, names: list[str]) -> tuple[str, list[str]]:
    """Experiment id, and the id of the latest run of each name.

    Raises:
        ValueError: There is no such experiment or run.
    """
    from mlflow import MlflowClient

    client = MlflowClient(address)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"--experiment {experiment}: not in this store")
    runs = client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"])
    latest = {run.info.run_name: run.info.run_id for run in reversed(list(runs))}
    for name in names:
        if name not in latest:
            raise ValueError(f"--runs {name}: not in experiment {experiment}, which has {', '.join(sorted(latest))}")
    return found.experiment_id, [latest[name] for name in names]


@contextmanager
def serving(store: str) -> Iterator[str]:
    """Address of `store`: itself, or that of a server started on it for the time of the block.

    Raises:
        ValueError: The file does not exist.
    """
    if store.startswith(("http://", "https://")):
        yield store.rstrip("/")
        return
    if not Path(store).is_file():
        raise ValueError(f"{store} is neither an SQLite file nor an http address")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{Path(store).resolve()}"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        wait_for_server(f"http://127.0.0.1:{port}", timeout_s=120)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def wait_for_server(address: str, timeout_s: float) -> None:
    """Poll until the server answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.25)


if __name__ == "__main__":
    main()
