"""Measurements of operators and collectives on a machine at hand: `shardplan profile`.

grid file -> `points` -> `plan` (what is left to do) -> `operators` or `collectives` (the calls) ->
`timing` -> `rates` (is it possible at all?) -> `table` (one CSV row a point). Only `backend` knows
torch.
"""
