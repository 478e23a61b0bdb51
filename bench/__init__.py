"""Benchmarks: `python -m bench COMMAND`, alone or under mpirun. Every timed result is verified."""
