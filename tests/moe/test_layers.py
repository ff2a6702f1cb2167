"""One MoE layer on two expert-parallel processes: values, gradients and bytes (`tests.moe.checks`)."""

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.testing import torchrun

NAMES = re.findall(r"^def (check_\w+)", Path(__file__).with_name("checks.py").read_text(), re.MULTILINE)


@cache
def results() -> dict[str, str]:
    with TemporaryDirectory() as folder:
        output = Path(folder, "results.json")
        torchrun("tests.moe.checks", str(output), nproc=2)
        return json.loads(output.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_check(name: str) -> None:
    assert results()[name] == ""
