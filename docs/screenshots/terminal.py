"""Take a picture of what a command prints on a terminal: `python docs/screenshots/terminal.py OUT.png COMMAND...`.

The command runs inside tmux, a real terminal, because a progress bar moves the cursor; when it has ended, the text
with its colours is drawn by a browser.  Needs tmux and chromium; not part of CI.

    python docs/screenshots/terminal.py docs/images/console.png qsparse train configs/quickstart.yaml run.name=picture
"""

import argparse
import io
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from browser import Browser
from PIL import Image
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

THEME = TerminalTheme(
    background=(13, 17, 23),
    foreground=(214, 220, 228),
    normal=[
        *((72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34)),
        *((88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)),
    ],
)
PAGE = """<!DOCTYPE html><meta charset="utf-8"><style>
body {{ margin: 0; padding: 14px 18px; display: inline-block; color: {foreground}; background: {background}; }}
pre {{ margin: 0; font: 13px/1.22 "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
{stylesheet}
</style><pre>{code}</pre>"""


def main() -> None:
    """Parse the command line and take one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command and its arguments")
    parser.add_argument("--columns", type=int, default=132, help="width of the terminal")
    parser.add_argument("--scale", type=float, default=1.25, help="device pixels per CSS pixel")
    arguments = parser.parse_args()
    text = run_in_terminal(arguments.command, arguments.columns)
    save_picture(text, arguments.output, arguments.columns, arguments.scale)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


def run_in_terminal(command: list[str], columns: int) -> str:
    """What `command` leaves on a terminal, as text with ANSI colours.

    Raises:
        ValueError: The command fails.
    """
    with tempfile.TemporaryDirectory(prefix="terminal-") as folder:
        status = Path(folder, "status")
        tmux = ["tmux", "-S", f"{folder}/socket"]
        script = f"clear; {shlex.join(command)}; echo $? > {shlex.quote(str(status))}; sleep 1000"
        options = [*tmux, "-f", "/dev/null", "set-option", "-g", "history-limit", "5000", ";"]
        size = ["-x", str(columns), "-y", "50"]
        subprocess.run([*options, "new-session", "-d", *size, "-s", "picture", "bash", "-c", script], check=True)
        try:
            while not status.is_file() or not status.read_text().endswith("\n"):
                time.sleep(0.5)
            capture = [*tmux, "capture-pane", "-t", "picture", "-e", "-p", "-S", "-"]
            text = subprocess.run(capture, check=True, capture_output=True, text=True).stdout
        finally:
            subprocess.run([*tmux, "kill-server"], check=False)
        if status.read_text().strip() != "0":
            raise ValueError(f"{shlex.join(command)} ended with exit code {status.read_text().strip()}")
    return f"$ {shlex.join(command)}\n{text.strip()}"


def save_picture(ansi: str, output: Path, columns: int, scale: float) -> None:
    """Draw text with ANSI colours as a PNG."""
    console = Console(record=True, width=columns, file=io.StringIO(), highlight=False)
    console.print(Text.from_ansi(ansi), soft_wrap=True)
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as page:
        page.write(console.export_html(theme=THEME, code_format=PAGE))
        page.flush()
        with Browser(columns * 8 + 36, 16 * (ansi.count("\n") + 1) + 28, scale=scale) as browser:
            browser.open(f"file://{page.name}")
            browser.wait_for("document.querySelector('pre') !== null", timeout_s=30)
            size = browser.evaluate("[document.body.offsetWidth, document.body.offsetHeight]")
            metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": scale, "mobile": False}
            browser.call("Emulation.setDeviceMetricsOverride", **metrics)
            browser.save(output)
    with Image.open(output) as picture:  # a terminal has few colours: a palette takes half the bytes
        picture.convert("RGB").quantize(64).save(output, optimize=True)


if __name__ == "__main__":
    main()
