"""The extension uses the threads it is given, and no more threads than torch was told."""

import os
import threading
import time

import pytest
import torch

from maskprune.ops.backend import extension
from maskprune.ops.least_s_prox import cpp

if extension() is None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)


def cpu_per_wall(threads: int, seconds: float = 0.4) -> float:
    """CPU seconds that the process spends per second of the calling thread's own CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mask, s, shrink = torch.rand(64, 28672), torch.tensor(9000.0), torch.tensor(0.9999)
        cpp(mask, s, shrink)
        process, own = time.process_time(), time.thread_time()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            cpp(mask, s, shrink)
        return (time.process_time() - process) / (time.thread_time() - own)
    finally:
        torch.set_num_threads(before)


def test_two_threads_work_when_two_are_asked_for():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    assert cpu_per_wall(2) > 1.3, "the extension ran on one thread: built without OpenMP?"


def test_one_thread_works_when_one_is_asked_for():
    assert cpu_per_wall(1) < 1.2


def test_other_python_threads_run_meanwhile():
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    mask, s, shrink = torch.rand(512, 53248), torch.tensor(9000.0), torch.tensor(0.9999)
    other = threading.Thread(target=tick)
    other.start()
    while not ticks:
        time.sleep(0.001)
    start = time.monotonic()
    cpp(mask, s, shrink)
    end = time.monotonic()
    done.set()
    other.join()
    assert any(start < t < end for t in ticks), "the interpreter lock was held through the call"
