"""README.md and docs/ name files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FOLDERS = "kernels|qsparse_layers|moe|pipeline|launch|tests|configs|docs"
REFERENCE = re.compile(rf"\b((?:{FOLDERS})/[\w./-]+\.(?:py|yaml|json|svg))\b(?::([A-Za-z_][\w.]*))?")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def names_in(path: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) that a module defines."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def missing_references(text: str) -> list[str]:
    """References of a page to files, or names in them, that do not exist."""
    missing = []
    for file, name in REFERENCE.findall(text):
        path, name = ROOT / file, name.rstrip(".")
        if not path.is_file() or (name and name not in names_in(path)):
            missing.append(f"{file}:{name}" if name else file)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_functions_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_references(text) == []
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_a_wrong_reference_is_noticed() -> None:
    text = "`pipeline/engine.py:Engine.train`, pipeline/engine.py:Engine.tran. pipeline/none.py configs/base.yaml"
    assert missing_references(text) == ["pipeline/engine.py:Engine.tran", "pipeline/none.py"]
