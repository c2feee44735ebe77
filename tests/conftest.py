"""Where no CUDA device is, Triton kernels run in Triton's interpreter: set before its import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
