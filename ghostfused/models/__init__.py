"""GhostNets in plain PyTorch: ``seed`` as the blog computes it, ``paper`` as the authors' repository and timm do."""

from . import paper, seed

__all__ = ["paper", "seed"]
