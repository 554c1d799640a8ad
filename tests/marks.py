"""What a test needs beside the package."""

import importlib.util

import pytest

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs offtrace[ray]")
