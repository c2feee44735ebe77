"""Every kernel, at every tile its dispatcher can choose, compiled for GPUs that are not here.

Add an operation by adding its cases to CASES; see `offline.Case` for the fields.
"""

import pytest
from offline import Case, compile_all

triton = pytest.importorskip("triton")

PROX_TYPES = {
    "m_ptr": "*fp32",
    "s_ptr": "*fp32",
    "shrink_ptr": "*fp32",
    "sum_sq_ptr": "*fp32",
    "next_sq_ptr": "*fp32",
    "N": "i32",
    "stride_row": "i32",
    "stride_s": "i32",
}
PROX_TABLE = {"offsets_ptr": "*i64", "lengths_ptr": "*i32"}
# So wide a row leaves a thread few registers beside its own entries: what it spills, it spills
# before and after the search. (warps, rows): (instructions in all, inside loops).
PROX_SPILLS = {
    (16, 9): (8, 0),
    (32, 6): (40, 0),
    (32, 7): (40, 0),
    (32, 9): (120, 0),
    (32, 11): (180, 0),
    (32, 13): (350, 12),
}


def prox_cases() -> list[Case]:
    from maskprune.kernels.least_s_rows import ALL_PAIRS_LIMIT, TILES, tile_for

    lengths = [1, 17, 33, ALL_PAIRS_LIMIT, *(tile[0] for tile in TILES), TILES[-1][0] + 1]
    cases = []
    for tile in map(tile_for, lengths):
        rows = sum(tile.sizes.get(R, 0) for R in ("R0", "R1", "R2"))
        spills, loop_spills = PROX_SPILLS.get((tile.warps, rows), (0, 0))
        for table in (False, True):
            cases.append(
                Case(
                    module="least_s_prox",
                    kernel=tile.kernel,
                    types=PROX_TYPES | (PROX_TABLE if table else {}),
                    constants={"TABLE": table, "WIDE": table, **tile.sizes}
                    | ({} if table else dict.fromkeys(PROX_TABLE)),
                    warps=tile.warps,
                    spills=spills,
                    loop_spills=loop_spills,
                    divisible=("m_ptr", "N", "stride_row"),
                    wide=tile.kernel != "all_pairs",
                )
            )
    return cases


CASES = [*prox_cases()]


@pytest.fixture(scope="module")
def compiled():
    return compile_all(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=Case.name)
def test_machine_code(compiled, case, target):
    found = compiled[f"{case.name()}/sm_{target}"]
    assert found["spills"] <= case.spills, f"local memory accesses: {found}"
    assert found["loop_spills"] <= case.loop_spills, f"local memory accesses in loops: {found}"
    if case.wide:
        assert found["loads128"] > 0 and found["stores128"] > 0, f"no 128-bit accesses: {found}"
