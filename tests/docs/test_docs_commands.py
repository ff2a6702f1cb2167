"""Every command and Python snippet that README.md and docs/ show to a reader: parsed always, run under `-m docs`.

A fenced block says what it is by its info string:

    ```bash                 run from the repository root, as one script with `set -euo pipefail`; blocks of one page
                            run in the order of the page and may build on each other
    ```bash gpu             the same, skipped here with a reason; so are `cluster` (needs SLURM or several machines),
                            `serve` (runs until it is stopped), `example` (stands for your own files or servers),
                            `pictures` (needs tmux and chromium),
                            `setup` (clones or installs what is already here) and `ci` (is a stage of .ci/run itself,
                            which a test compares with it)
    ```yaml                 part of a configuration: must load over the defaults
    ```python               run from the repository root by this interpreter; the same words skip it
    ```console ```text ...  anything else is an illustration and not looked at

Skipped blocks are checked too: bash must parse them, `qsparse` must accept the arguments, configurations must load.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.arguments import split_overrides
from launch.cli import build_parser
from pipeline.config_loader import load_config

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {
    "gpu": "needs a CUDA GPU",
    "cluster": "needs SLURM or several machines",
    "serve": "runs until it is stopped",
    "example": "stands for your own files or servers",
    "pictures": "needs tmux and chromium",
    "setup": "clones or installs what is already here",
    "ci": "is a stage of .ci/run itself",
}
FENCE = re.compile(r"^( *)```(bash|python) *([^\n`]*)\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 1800


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    tags: tuple[str, ...]
    script: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"


def find_blocks(page: Path) -> list[Block]:
    """The bash and Python blocks of a page, indentation (inside lists) removed."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        indent, language, tags, body = match.groups()
        script = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(page, line, language, tuple(tags.split()), script))
    return blocks


def qsparse_commands(script: str) -> list[list[str]]:
    """Arguments of each `qsparse` call in a script, up to a pipe, redirection or other operator."""
    commands = []
    for words in logical_lines(script):
        current: list[str] | None = None
        at_start = True
        for word in words:
            if set(word) <= set("();<>|&"):
                current, at_start = None, True
            elif current is not None:
                current.append(word)
            elif at_start and word == "qsparse":
                current = []
                commands.append(current)
            else:
                # Variables may be set in front of a command.
                at_start = at_start and "=" in word
    return commands


def logical_lines(script: str) -> Iterator[list[str]]:
    """Words of each line; lines that a quote or a backslash continues are one."""
    pending = ""
    for line in script.replace("\\\n", " ").splitlines():
        pending += line
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            yield list(lexer)
        except ValueError:  # an open quote
            pending += "\n"
        else:
            pending = ""


YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if page.is_file()]
BLOCKS = [block for page in PAGES for block in find_blocks(page)]
each_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
each_bash_block = pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "bash"], ids=lambda block: block.name
)


@each_block
def test_block_is_well_formed(block):
    assert set(block.tags) <= set(SKIPPED), f"{block.name}: unknown tag among {block.tags}; known: {', '.join(SKIPPED)}"
    if block.language == "python":
        compile(block.script, block.name, "exec")
        return
    result = subprocess.run(["bash", "-n", "-c", block.script], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, f"{block.name}: {result.stderr}"


@each_bash_block
def test_qsparse_accepts_the_arguments(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments in qsparse_commands(block.script):
        check_arguments(arguments, block.name)


def check_arguments(arguments: list[str], place: str) -> None:
    """Fail unless `qsparse` parses the arguments and a configuration named in them loads."""
    if "--help" in arguments or "--version" in arguments:
        return
    try:
        parsed, rest = build_parser().parse_known_args(arguments)
    except SystemExit:
        pytest.fail(f"{place}: qsparse does not understand: {shlex.join(arguments)}")
    assert hasattr(parsed, "rest") or not rest, f"{place}: unrecognized arguments: {shlex.join(rest)}"
    if arguments[0] == "train":
        load_config(parsed.config, split_overrides([*parsed.overrides, *rest])[1])


@pytest.mark.parametrize("block", [block for block in BLOCKS if "ci" in block.tags], ids=lambda block: block.name)
def test_ci_runs_what_is_left_to_it(block):
    stages = re.findall(r"^stage \w+ (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [re.sub(r"\s+#.*", "", line) for line in block.script.splitlines()]
    assert set(commands) <= set(stages), f"{block.name}: .ci/run has only {', '.join(stages)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_load(page, tmp_path):
    for number, text in enumerate(YAML.findall(page.read_text(encoding="utf-8"))):
        path = tmp_path / f"{page.stem}-{number}.yaml"
        path.write_text(text, encoding="utf-8")
        load_config(path)


@pytest.mark.docs
@each_block
def test_block_runs(block):
    for tag in block.tags:
        pytest.skip(f"{block.name}: {SKIPPED[tag]}")
    # The commands of this interpreter's environment, wherever the caller's shell looks.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    runner = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    command = [*runner, block.script]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert result.returncode == 0, f"{block.name} failed:\n{block.script}\n{result.stdout[-4000:]}"


PAGE = """# Title
```bash
qsparse train configs/quickstart.yaml \\
    training.steps=5
A=1 qsparse config show | head -n 1 && qsparse doctor > out.txt  # comment
echo qsparse not a command
qsparse generate runs/x --prompt "two
lines"
```
- item
  ```bash gpu
  qsparse train configs/gpt_7b.yaml --nproc 8 parallel.dp=2
  ```
```console
$ qsparse nonsense
```
```python
print(1)
```
"""


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    first, second, third = find_blocks(page)
    assert (first.line, first.language, first.tags) == (2, "bash", ())
    assert (second.line, second.language, second.tags) == (11, "bash", ("gpu",))
    assert (third.line, third.language, third.script) == (17, "python", "print(1)\n")
    assert second.script == "qsparse train configs/gpt_7b.yaml --nproc 8 parallel.dp=2\n"
    assert qsparse_commands(first.script) == [
        ["train", "configs/quickstart.yaml", "training.steps=5"],
        ["config", "show"],
        ["doctor"],
        ["generate", "runs/x", "--prompt", "two\nlines"],
    ]


def test_wrong_arguments_are_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    check_arguments(["train", "configs/gpt_7b.yaml", "--nproc", "16", "parallel.dp=4"], "here")
    with pytest.raises(pytest.fail.Exception, match="qsparse does not understand: trian"):
        check_arguments(["trian"], "here")
    with pytest.raises(AssertionError, match="unrecognized arguments: --color"):
        check_arguments(["config", "show", "--color"], "here")
    with pytest.raises(ValueError, match="did you mean 'model'"):
        check_arguments(["train", "configs/quickstart.yaml", "modle.num_layers=3"], "here")
