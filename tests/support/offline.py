"""Compile Triton kernels for GPUs that are not here, and read the machine code that results.

As a script it takes a JSON list of cases on stdin and prints one JSON result for each: it must
run without TRITON_INTERPRET, which would turn every kernel into Python.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from multiprocessing import Pool
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One kernel at one tile, and what its machine code must look like.

    module, kernel: `maskprune.kernels.<module>`, the name of the jit function in it.
    types: every run-time argument, as Triton spells types ("*fp32", "i32", "fp32").
    constants: every constexpr argument, and arguments that are None.
    divisible: arguments that the launcher gives as multiples of 16 (pointers among them).
    spills, loop_spills: most local loads and stores (LDL + STL instructions) allowed in all, and
        inside loops.
    wide: whether 128-bit loads and stores of global memory must appear.
    """

    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    divisible: tuple[str, ...] = ()
    stages: int = 1
    spills: int = 0
    loop_spills: int = 0
    wide: bool = True
    targets: tuple[int, ...] = field(default=(80, 90))

    def name(self) -> str:
        sizes = "-".join(f"{k}{v}" for k, v in self.constants.items() if v is not None)
        first = next(iter(self.types.values())).removeprefix("*")
        return f"{self.kernel}-{first}-{sizes}-w{self.warps}"


def compile_all(cases: list[Case]) -> dict[str, dict[str, Any]]:
    """`name/sm` -> {registers, stack, spills, loop_spills, loads128, stores128, loads, stores}."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        env=env,
    )
    if done.returncode:
        raise RuntimeError(f"offline compile failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def _compile(job: tuple[dict[str, Any], int]) -> tuple[str, dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fields, target = job
    case = Case(**fields)
    fn = getattr(importlib.import_module(f"maskprune.kernels.{case.module}"), case.kernel)
    names = list(fn.arg_names)
    given = case.types.keys() | case.constants.keys()
    if given != set(names):
        raise ValueError(f"{case.kernel}: arguments {sorted(given ^ set(names))} do not match")
    compiled = triton.compile(
        ASTSource(
            fn=fn,
            signature={n: case.types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): v for n, v in case.constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible},
        ),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    return f"{case.name()}/sm_{target}", _read(compiled.asm["cubin"], Path(triton.__file__).parent)


def _read(cubin: bytes, triton_folder: Path) -> dict[str, Any]:
    tool = triton_folder / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            command = [str(tool), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    found = {
        "spills": r"\b(?:LDL|STL)\b",
        "loads": r"\bLDG\.E",
        "stores": r"\bSTG\.E",
        "loads128": r"\bLDG\.E\.(?:\w+\.)*128",
        "stores128": r"\bSTG\.E\.(?:\w+\.)*128",
    }
    counts = {name: len(re.findall(pattern, code)) for name, pattern in found.items()}
    return {
        "registers": int(registers),
        "stack": int(stack),
        **counts,
        "loop_spills": _loop_spills(code),
    }


def _loop_spills(code: str) -> int:
    """Accesses to local memory inside a loop."""
    lines = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    place = {address: i for i, (address, _) in enumerate(lines)}
    after: list[list[int]] = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        always = re.match(r"(?:BRA|EXIT|RET)\b(?!.*\bU?!?P\d)", text)
        nexts = [place[int(jump.group(1), 16)]] if jump else []
        after.append(nexts if always or i + 1 == len(lines) else [*nexts, i + 1])

    def returns(start: int) -> bool:
        seen, todo = set(), list(after[start])
        while todo:
            i = todo.pop()
            if i == start:
                return True
            if i not in seen:
                seen.add(i)
                todo += after[i]
        return False

    local = [i for i, (_, text) in enumerate(lines) if re.search(r"\b(?:LDL|STL)\b", text)]
    return sum(map(returns, local))


if __name__ == "__main__":
    jobs = [(case, target) for case in json.load(sys.stdin) for target in case["targets"]]
    with Pool(len(os.sched_getaffinity(0))) as pool:
        json.dump(dict(pool.imap_unordered(_compile, jobs)), sys.stdout)
