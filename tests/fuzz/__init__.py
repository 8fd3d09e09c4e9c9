"""Draws modules, bottlenecks, networks and malformed calls by number, and compares fused with unfused: ``python -m tests.fuzz``."""
