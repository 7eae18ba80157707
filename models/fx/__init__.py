"""Strategies applied to PyTorch graphs (extra `torch`): per-rank modules with collectives."""
