"""Runnable scripts: task, budget, devices."""
