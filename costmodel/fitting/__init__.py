"""Fits of kernel coefficients to measured operator tables; run by hand, never by a search.

Each module reads tables from a folder the user names and writes one family of
`data/calibrations/<name>/*.toml`: `python -m shardplan.costmodel.fitting.matmul DATA_DIR`.
"""

from __future__ import annotations
