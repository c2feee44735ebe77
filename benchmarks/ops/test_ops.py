"""Operations one by one under pytest-benchmark, each checked against its definition.

    pytest benchmarks/ops/test_ops.py --rows benchmarks/results/ops.jsonl --overwrite

For a quick look at one machine; providers are not interleaved here, so ratios between operations
and torch come from prox.py, fold.py, masked_forward.py and two_four.py.
`make test` runs these too, without timing.
"""

import pytest
import torch

from benchmarks.harness import same_as
from maskprune import ops
from maskprune.ops.backend import unavailable

# Rounded once to bfloat16 by either backend; float32 may differ in the order of operations.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
DTYPES = pytest.mark.parametrize("dtype", RTOL, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    if reason := unavailable(request.param, torch.device("cpu")):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def case(**sizes):
    return {name: str(v)[6:] if isinstance(v, torch.dtype) else v for name, v in sizes.items()}


@DTYPES
def test_fold_columns(bench, backend, random, dtype):
    W, scale = random(576, 1536).to(dtype), random(1536).abs()
    keep = torch.arange(0, 1536, 2)
    expected = ops.fold_columns(W, scale, keep, backend="reference")
    bench("fold_columns", backend, lambda: ops.fold_columns(W, scale, keep, backend=backend),
          check=same_as(expected), **case(O=576, I=1536, K=768, dtype=dtype))  # fmt: skip


@DTYPES
def test_gather_rows(bench, backend, random, dtype):
    W, keep = random(1536, 576).to(dtype), torch.arange(0, 1536, 2)
    bench("gather_rows", backend, lambda: ops.gather_rows(W, keep, backend=backend),
          check=same_as(W[keep]), **case(O=1536, I=576, K=768, dtype=dtype))  # fmt: skip


@DTYPES
def test_masked_swiglu(bench, backend, random, dtype):
    gate, up, mask = random(256, 1536).to(dtype), random(256, 1536).to(dtype), random(1536).abs()
    expected = ops.masked_swiglu(gate, up, mask, backend="reference")
    bench("masked_swiglu", backend, lambda: ops.masked_swiglu(gate, up, mask, backend=backend),
          check=same_as(expected, rtol=RTOL[dtype], atol=1e-6),
          **case(T=256, F=1536, dtype=dtype))  # fmt: skip


@DTYPES
def test_scale_heads(bench, backend, random, dtype):
    x, mask = random(256, 9 * 64).to(dtype), random(9).abs()
    expected = ops.scale_heads(x, mask, backend="reference")
    bench("scale_heads", backend, lambda: ops.scale_heads(x, mask, backend=backend),
          check=same_as(expected, rtol=RTOL[dtype], atol=1e-6),
          **case(T=256, H=9, d_h=64, dtype=dtype))  # fmt: skip


@DTYPES
def test_gumbel_two_four(bench, backend, random, dtype):
    W, logits = random(576, 1536).to(dtype), 0.01 * random(6, 576, 384)
    scalars = torch.tensor(7), torch.tensor(100.0), torch.tensor(4.0)
    expected = ops.gumbel_two_four(W, logits, *scalars, backend="reference")
    bench("gumbel_two_four", backend,
          lambda: ops.gumbel_two_four(W, logits, *scalars, backend=backend),
          check=same_as(expected, rtol=max(RTOL[dtype], 1e-5), atol=1e-6),
          **case(O=576, I=1536, dtype=dtype))  # fmt: skip
