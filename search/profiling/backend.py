"""The device at hand: torch, its runtime, its name and its driver. Nothing else imports torch."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardplan.models.errors import InputError, UnknownNameError

__all__ = ["KINDS", "Kind", "Target", "open_target"]

Kind = Literal["npu", "cuda", "cpu"]
KINDS = ("npu", "cuda", "cpu")
_CPU_CACHE_BYTES = 32 * 2**20
"""Assumed last-level cache of a CPU: torch does not tell it."""
_NPU_CACHE_BYTES = 192 * 2**20
"""L2 of the 910B (`costmodel/data/devices/910b2.toml`), the largest of the supported NPUs."""
_ASCEND_VERSION = Path("/usr/local/Ascend/driver/version.info")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One device and what drives it."""

    kind: Kind
    torch: Any
    """The module torch."""
    runtime: Any
    """torch.cuda or torch.npu; None on a CPU."""
    place: str
    """The device as tensors name it, such as `cuda:0`."""
    name: str
    driver: str
    version: str
    """Of torch, with that of torch_npu where there is one."""
    cache_bytes: float
    """Last-level cache, which rotated weights must exceed."""
    memory_bytes: float
    """Free memory of the device when the run starts."""

    @property
    def graphs(self) -> bool:
        """Whether calls can be captured once and replayed."""
        names = ("CUDAGraph", "NPUGraph")
        return self.runtime is not None and any(hasattr(self.runtime, name) for name in names)

    def dtype(self, name: str) -> Any:
        """The torch dtype of ours."""
        names = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
        return getattr(self.torch, names[name])

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.runtime is not None:
            self.runtime.synchronize()


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "`profile` needs PyTorch", got=str(error), hint="pip install 'shardplan[torch]'"
        ) from None
    return torch


def _import_torch_npu() -> Any:
    try:
        import torch_npu
    except ImportError as error:
        raise InputError(
            "`--device npu` needs torch_npu",
            got=str(error),
            hint="install the torch_npu that goes with this PyTorch and CANN",
        ) from None
    return torch_npu


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.stdout.strip() else ""


def _npu_driver() -> str:
    try:
        text = _ASCEND_VERSION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = [line.partition("=")[2].strip() for line in text.splitlines() if "ersion=" in line]
    return found[0] if found else ""


def _cpu(torch: Any) -> Target:
    return Target(
        kind="cpu",
        torch=torch,
        runtime=None,
        place="cpu",
        name=f"CPU {platform.machine()} {torch.get_num_threads()} threads",
        driver=platform.release(),
        version=str(torch.__version__),
        cache_bytes=_CPU_CACHE_BYTES,
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")),
    )


def open_target(kind: str, local_rank: int = 0) -> Target:
    """The device of this process; `InputError` where it, torch or torch_npu is not there."""
    if kind not in KINDS:
        raise UnknownNameError("device to profile", kind, KINDS)
    torch = _import_torch()
    if kind == "cpu":
        return _cpu(torch)
    version = str(torch.__version__)
    if kind == "npu":
        version += f" torch_npu {_import_torch_npu().__version__}"
    runtime = getattr(torch, kind)
    if not runtime.is_available() or runtime.device_count() <= local_rank:
        count = runtime.device_count() if runtime.is_available() else 0
        raise InputError(
            f"`--device {kind}` needs a {kind} device for each process",
            got=f"PyTorch {version} sees {count}",
        )
    runtime.set_device(local_rank)
    facts = runtime.get_device_properties(local_rank)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Target(
        kind="cuda" if kind == "cuda" else "npu",
        torch=torch,
        runtime=runtime,
        place=f"{kind}:{local_rank}",
        name=str(runtime.get_device_name(local_rank)),
        driver=_first_line(*query) if kind == "cuda" else _npu_driver(),
        version=version,
        cache_bytes=float(getattr(facts, "L2_cache_size", _NPU_CACHE_BYTES)),
        memory_bytes=float(runtime.mem_get_info()[0]),
    )
