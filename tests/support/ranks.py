"""Several processes as torchrun starts them, forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["rank_jobs"])


def launch(n: int, job: Callable[..., None], folder: Path, *args: Any) -> list[Any]:
    """Start `job(folder, *args)` on n ranks; what rank r prints goes to folder/{out,err}.r."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    processes = [
        SERVER.Process(target=_rank, args=(r, n, port, job, folder, args)) for r in range(n)
    ]
    # The server that imports what the ranks need finds it by this path alone.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        for process in processes:
            process.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return processes


def wait(processes: list[Any], folder: Path, seconds: float = 400) -> list[int]:
    """The exit codes, once all have ended."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [r for r, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not late, f"ranks {late} still ran after {seconds} s\n{said(folder)}"
    return [process.exitcode for process in processes]


def run_ranks(n: int, job: Callable[..., None], folder: Path, *args: Any) -> None:
    """`job(folder, *args)` on n ranks, to a good end."""
    codes = wait(launch(n, job, folder, *args), folder)
    assert codes == [0] * n, said(folder)


def said(folder: Path, kind: str = "err") -> str:
    """What all ranks have printed."""
    return "".join(path.read_text() for path in sorted(folder.glob(f"{kind}.*")))


def _rank(r: int, n: int, port: int, job: Callable[..., None], folder: Path, args: Any) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{kind}.{r}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ |= {
        "RANK": str(r),
        "LOCAL_RANK": str(r),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    try:
        job(folder, *args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
