"""The benchmarks that are more than a table."""
