"""Seconds of one kernel: one module a family, each a formula over arrays of sizes.

Every formula takes a `Machine` and arrays that broadcast, and gives a `KernelTime`
(`shardplan.costmodel.kernels.base`).
"""
