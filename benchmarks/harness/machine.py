"""The machine that a result row was taken on; energy where NVML counts it."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def sync(device: str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _output(*command: str) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def machine(device: str) -> dict[str, Any]:
    """CPU, cores, RAM, GPU, its clocks where nvidia-smi tells them, versions, and the commit."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [n for n in info.read_text().splitlines() if n.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    line: dict[str, Any] = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "device": device}
    if device.startswith("cuda"):
        line["gpu"] = torch.cuda.get_device_name(device)
        fields = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,driver_version"
        line["gpu_clocks"] = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    here = Path(__file__).parent
    commit = _output("git", "-C", str(here), "rev-parse", "--short", "HEAD")
    dirty = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    versions = {name: _version(name) for name in ("maskprune", "triton", "transformers")}
    line |= {"python": platform.python_version(), "torch": torch.__version__, **versions}
    return line | {"commit": f"{commit}+" if commit and dirty else commit}


def environment(device: str, seed: int) -> dict[str, Any]:
    """The machine line, threads, seed and UTC date: what every row carries."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**machine(device), "threads": torch.get_num_threads(), "seed": seed, "date": date}


def joules_per_call(call: Callable[[], Any], device: str, seconds: float = 1.0) -> float | None:
    """Energy of one call by NVML's counter over `seconds` of calls; None where NVML is absent."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.device(device).index or 0)
        start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:
        return None
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        sync(device)
        calls += 1
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1e3 / calls
