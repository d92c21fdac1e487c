"""Benchmarks of psap: each verifies what it times first, and writes JSON lines."""
