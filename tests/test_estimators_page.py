"""docs/estimators.md is true: its examples run, and its V-trace is ours, the weight of the advantages included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from offtrace.modules.estimators import VTrace
from offtrace.modules.estimators.base import Outcome

PAGE = Path(__file__).resolve().parent.parent / "docs" / "estimators.md"


def classes() -> dict[str, Any]:
    """What the page's examples define."""
    found: dict[str, Any] = {}
    for text in re.findall(r"```python\n(from .*?)```", PAGE.read_text(), re.DOTALL):
        exec(text, found)
    return found


def test_the_v_trace_of_the_page_is_ours_with_another_clip() -> None:
    torch.manual_seed(0)
    flag = torch.zeros(4, 6, dtype=torch.bool)
    outcome = Outcome(torch.randn(4, 6), flag, flag, None)
    known = {name: torch.randn(4, 6) for name in ("value", "next_value", "log_rho")}
    found = classes()["MyVTrace"](clip=2.0, gamma=0.9).estimate(outcome, **known)
    ours = VTrace(rho_clip=2.0, c_clip=1.0, pg_rho_clip=2.0, gamma=0.9).estimate(outcome, **known)
    for name in ("target", "advantage", "weight"):
        torch.testing.assert_close(getattr(found, name), getattr(ours, name))
    assert found.weight.std() > 0


def test_the_trace_of_the_page_is_the_square_root() -> None:
    trace = classes()["RootRetrace"](gamma=0.9).trace(log_pi=None, log_rho=torch.tensor([0.25, 4.0]).log())
    torch.testing.assert_close(trace, torch.tensor([0.5, 1.0]))
