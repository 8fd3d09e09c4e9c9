"""How a stranger's module is read, and proved to compute the same as its fused twin."""
