"""Readers of the files that profilers and benchmarks write: one module a format.

    kernel_table    Ascend PyTorch profiler `kernel_details.csv`, msprof `op_summary_*.csv`
    communication   Ascend PyTorch profiler `communication.json`
    hccl_log        what hccl_test prints
    own_csv         the CSV of `shardplan profile`

`read.read_profile` tells the format from the first lines and gives a `measurement.ReadFile`:
measured operators by shape, and what was skipped and why. A file that breaks the rules of its
format is refused with its name, line and reason (`DataFileError`).
"""
