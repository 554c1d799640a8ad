"""What all tests share."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from offtrace.modules.envs.suite import MISSING, has_dm_control

# the same examples in every run, and none kept in a folder; a loaded machine is slow, and no test measures that
settings.register_profile("offtrace", derandomize=True, database=None, deadline=None)
settings.load_profile("offtrace")


def _seed(number: int) -> None:
    import torch  # not when pytest starts: the process that deals tests to others needs none

    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws depends neither on the tests before it nor on its fixtures; one marked cuda needs a GPU."""
    _seed(0)
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU that torch can use")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed(1)


@pytest.fixture(scope="session", autouse=True)
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled code comes from this run; only headers, which are slow to make, stay where torch keeps them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def sockets() -> Iterator[None]:
    """A folder for the sockets of processes that are killed, which nobody removes; their paths must be short."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield


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
