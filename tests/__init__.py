"""Tests of shardplan: folders mirror the packages; `python -m tests` runs every check."""
