"""Runs the sm_90 machine code of the kernels on the CPU and counts what a GPU would issue: see ``python -m tools.sass --help``."""
