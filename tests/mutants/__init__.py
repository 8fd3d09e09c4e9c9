"""Faults planted in the CUDA kernel, each of which the tests' cases must find: ``python -m tests.mutants``."""
