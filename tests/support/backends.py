"""What the tests of operations run on: backends, instruction sets, devices."""

from __future__ import annotations

import pytest
import torch

from maskprune.ops.backend import extension, unavailable
from maskprune.ops.least_s_prox import ISAS, cpp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def available_isas() -> list[str]:
    """The instruction sets of the extension that this machine runs, "auto" left out."""
    return [isa for isa in ISAS if isa != "auto" and refusal(isa) is None]


def refusal(isa: str) -> str | None:
    """Why the extension refuses an instruction set; None if it runs it."""
    try:
        cpp(torch.zeros(1, 1), torch.tensor(0.0), torch.tensor(1.0), isa)
    except ValueError as error:
        return str(error)
    return None


def skip_unless_available(name: str) -> None:
    """name: a backend, or "cpp:<instruction set>", which runs on the CPU wherever tests run."""
    backend, _, isa = name.partition(":")
    if reason := unavailable(backend, torch.device("cpu") if isa else DEVICE):
        pytest.skip(reason)
    if isa and (reason := refusal(isa)):
        pytest.skip(reason)


def skip_without_extension() -> None:
    if extension() is None:
        pytest.skip(unavailable("cpp", torch.device("cpu")))
