"""A headless Chromium for tests, with the tools that take the pictures of the docs."""

import warnings
from typing import Any

import pytest

from tests.testing import ROOT


def open_browser(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> Any:
    """A browser, to be used as a context manager; skips the test, and says so loudly, where there is none."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "screenshots"))
    from browser import Browser  # type: ignore[import-not-found]

    try:
        return Browser(width, height)
    except ValueError as error:
        reason = f"NO BROWSER TESTS: {error}"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)
