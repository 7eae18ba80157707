"""What it costs: devices, clusters and the seconds and bytes of a sharded graph on them.

Prices come from formulas on numpy arrays (`kernels`), with coefficients fitted to measurements
(`data/calibrations`) and hardware numbers that each name their source (`data/devices`,
`data/clusters`). Imports `models`, never `search`.
"""
