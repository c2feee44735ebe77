"""Every kernel, at every tile its dispatcher can choose, compiled for GPUs that are not here.

Add an operation by adding its cases to CASES; see `offline.Case` for the fields.
"""

import itertools

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

# By warps: what the compiler leaves outside loops where it aims at several programs on one SM, for
# wide heads and for scalars. Nothing else spills, and no loop. Widths are multiples of 16 here: of
# others every access is 32 bits, and the widest rows spill up to 114 times, 53 of them in loops.
MINIMAX_SPILLS = {4: 2, 8: 8}


def prox_cases() -> list[Case]:
    from maskprune.kernels.least_s_rows import LONGEST, tile_for

    lengths = [1, 17, 33, *LONGEST, LONGEST[-1] + 1]
    return [
        Case(
            module="least_s_prox",
            kernel="prox_rows",
            types=PROX_TYPES,
            constants=tile.constants,
            warps=tile.warps,
            divisible=("m_ptr", "N", "stride_row"),
            wide=tile.constants["KERNEL"] != "all_pairs",
        )
        for tile in map(tile_for, lengths)
    ]


def minimax_cases() -> list[Case]:
    from maskprune.kernels.least_s_rows import LONGEST
    from maskprune.kernels.minimax_step import RATE_NAMES, constants, ffn_tile

    pointers = "head ffn state table saved_head saved_ffn sum_sq next_sq counter".split()
    types = {f"{name}_ptr": "*fp32" for name in pointers} | {"counter_ptr": "*i32"}
    types |= dict.fromkeys(("R_head", "D_head", "R_ffn", "D_ffn", "splits"), "i32")
    types |= dict.fromkeys(RATE_NAMES, "fp32")
    widths = [(128, D_ffn) for D_ffn in (*LONGEST[1:], LONGEST[-1] + 1)]
    widths += [(D_head, LONGEST[1]) for D_head in (1, 32, 64)]
    cases = []
    for D_head, D_ffn in widths:
        tile = ffn_tile(D_ffn)
        cases.append(
            Case(
                module="minimax_step",
                kernel="step_rows_then_scalars",
                types=types,
                constants=constants(D_head, D_ffn, scheduled=False),
                warps=tile.warps,
                spills=MINIMAX_SPILLS.get(tile.warps, 0),
                divisible=(*(f"{name}_ptr" for name in pointers), "D_ffn"),
            )
        )
    return cases


def swiglu_cases() -> list[Case]:
    from maskprune.kernels.masked_swiglu import BLOCK_F, BLOCK_T, WARPS

    cases = []
    for (dtype, size), gelu in itertools.product((("*bf16", 2), ("*fp32", 4)), (False, True)):
        constants = {"GELU": gelu, "BLOCK_T": BLOCK_T[size], "BLOCK_F": BLOCK_F}
        inputs = {"gate_ptr": dtype, "up_ptr": dtype, "m_ptr": "*fp32"}
        sizes = dict.fromkeys(("T", "F", "stride_gt", "stride_ut"), "i32")
        forward = inputs | {"out_ptr": dtype} | sizes
        grads = {"dout_ptr": dtype, "dgate_ptr": dtype, "dup_ptr": dtype, "partial_ptr": "*fp32"}
        backward = inputs | grads | sizes | {"slab": "i32", "stride_dt": "i32"}
        for kernel, types in (("forward", forward), ("backward", backward)):
            cases.append(
                Case(
                    module="masked_swiglu",
                    kernel=f"masked_swiglu_{kernel}",
                    types=types,
                    constants=constants,
                    warps=WARPS,
                    divisible=tuple(name for name in types if name not in ("T", "slab")),
                )
            )
    return cases


def heads_cases() -> list[Case]:
    from maskprune.kernels.scale_heads import WARPS, tile_of

    cases = []
    for dtype, size in (*(("*bf16", D) for D in (64, 96, 128, 256)), ("*fp32", 128)):
        sizes = dict.fromkeys(("T", "H", "stride_xt"), "i32")
        forward = {"x_ptr": dtype, "m_ptr": "*fp32", "out_ptr": dtype} | sizes
        grads = {"dout_ptr": dtype, "dx_ptr": dtype, "partial_ptr": "*fp32"}
        backward = {"x_ptr": dtype, "m_ptr": "*fp32"} | grads | sizes
        backward |= {"slab": "i32", "stride_dt": "i32"}
        for kernel, types in (("forward", forward), ("backward", backward)):
            cases.append(
                Case(
                    module="scale_heads",
                    kernel=f"scale_heads_{kernel}",
                    types=types,
                    constants={"D": size, **tile_of(size)},
                    warps=WARPS,
                    divisible=tuple(n for n in types if n not in ("T", "H", "slab")),
                )
            )
    return cases


def gumbel_cases() -> list[Case]:
    from maskprune.kernels.gumbel_two_four import BLOCK, BLOCK_S, SUM_WARPS, WARPS

    scalars = {"seed_ptr": "*i64", "kappa_ptr": "*fp32", "tau_ptr": "*fp32"}
    cases = []
    for dtype in ("*bf16", "*fp32"):
        inputs = {"w_ptr": dtype, "pi_ptr": "*fp32"} | scalars | {"G": "i32"}
        forward = inputs | {"masked_ptr": dtype, "partial_ptr": "*fp32"}
        backward = inputs | {"dmasked_ptr": dtype, "dnorm_sq_ptr": "*fp32", "dpi_ptr": "*fp32"}
        for kernel, types in (("forward", forward), ("backward", backward)):
            cases.append(
                Case(
                    module="gumbel_two_four",
                    kernel=f"gumbel_two_four_{kernel}",
                    types=types,
                    constants={"APPROXIMATE": True, "BLOCK": BLOCK},
                    warps=WARPS,
                    divisible=tuple(types),
                )
            )
    cases.append(
        Case(
            module="gumbel_two_four",
            kernel="sum_partials",
            types={"partial_ptr": "*fp32", "out_ptr": "*fp32", "S": "i32"},
            constants={"BLOCK_S": BLOCK_S},
            warps=SUM_WARPS,
            divisible=("partial_ptr", "out_ptr"),
            wide=False,
        )
    )
    return cases


def slab_cases() -> list[Case]:
    from maskprune.kernels.slabs import BLOCK_N, BLOCK_S

    types = {"partial_ptr": "*fp32", "out_ptr": "*fp32", "S": "i32", "N": "i32"}
    return [
        Case(
            module="slabs",
            kernel="sum_slabs",
            types=types,
            constants={"BLOCK_S": BLOCK_S, "BLOCK_N": BLOCK_N},
            warps=4,
            divisible=("partial_ptr", "out_ptr", "N"),
            wide=False,
        )
    ]


CASES = [
    *prox_cases(),
    *minimax_cases(),
    *swiglu_cases(),
    *heads_cases(),
    *gumbel_cases(),
    *slab_cases(),
]


@pytest.fixture(scope="module")
def compiled():
    return compile_all(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=Case.name)
def test_kernels_compile_with_the_expected_spills_and_128_bit_accesses(compiled, case, target):
    found = compiled[f"{case.name()}/sm_{target}"]
    assert found["spills"] <= case.spills, f"local memory accesses: {found}"
    assert found["loop_spills"] <= case.loop_spills, f"local memory accesses in loops: {found}"
    if case.wide:
        assert found["loads128"] > 0 and found["stores128"] > 0, f"no 128-bit accesses: {found}"
