"""The nearest of the names that are known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` or nothing."""
    known = list(known)
    name = word.lstrip("-").split(".")[-1]
    # the right name without its group, or in the wrong one, before a name that merely looks alike
    near = [flag for flag in known if flag.lstrip("-").split(".")[-1] == name]
    near = near or difflib.get_close_matches(word, known, 1, 0.4)
    return f"; did you mean {near[0]}?" if near else ""
