"""What all tests share."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from offtrace.modules.envs.suite import MISSING, has_dm_control


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """Where dm_control is not installed, a test that was refused one of its tasks is skipped, and says so."""
    report = yield
    if report.failed and not has_dm_control():
        told = [report.longreprtext, *(text for _, text in report.sections)]
        if any(MISSING in text for text in told):
            path, line, _ = item.location
            report.outcome = "skipped"
            report.longrepr = (path, line or 0, f"Skipped: this test {MISSING}")
    return report
