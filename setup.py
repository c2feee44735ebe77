"""Names the one C++ extension; everything else is in pyproject.toml.

The extension links no torch, so it builds in isolation in seconds and one wheel serves every
torch. Without a compiler the install succeeds without it, unless MASKPRUNE_REQUIRE_EXT=1.
"""

import os
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# OpenMP must be named at compile and at link, or the loops are silently serial.
openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
# No silent multiply-add: the same sums to the bit whatever instruction set runs. No care for the
# floating-point exception flags, which nothing here reads: with it, selects do not vectorise.
floats = [] if sys.platform == "win32" else ["-ffp-contract=off", "-fno-trapping-math"]
extension = Pybind11Extension(
    "maskprune._C",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.hpp")),
    cxx_std=17,
    extra_compile_args=["-O3", *floats, *openmp],
    extra_link_args=openmp,
)
extension.optional = os.environ.get("MASKPRUNE_REQUIRE_EXT") != "1"

with ParallelCompile("MAX_JOBS", default=0):
    setup(ext_modules=[extension])
