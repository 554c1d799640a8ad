"""What the tests that run recipes in this process share."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offtrace.agents.config import Machine
from offtrace.recipes import cli


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes in this process begin with their presets, whatever machine runs the tests."""
    monkeypatch.setattr(cli, "this_machine", lambda: Machine(2))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to run in; what a recipe sets for its whole process is put back."""
    monkeypatch.chdir(tmp_path)
    environment = dict(os.environ)
    level = logging.getLogger("lightning.pytorch").level
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(level)
