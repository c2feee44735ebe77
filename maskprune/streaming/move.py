"""One tensor from file to file, cut, folded and merged on the way, in blocks of rows.

The Python loop is the definition; the C++ one (csrc/stream.cpp) writes the same bytes and uses
all threads. An adapter is merged in the Python loop.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from maskprune import ops
from maskprune.ops.backend import BYTES, DTYPE_CODES, extension
from maskprune.ops.fold import scale_exactly
from maskprune.streaming.lora import TORCH_DTYPES, Lora
from maskprune.streaming.progress import ByteProgress
from maskprune.streaming.safetensors_file import Planned, Stored
from maskprune.structured.cuts import Cut

# So that a block and its result stay in the L2 cache.
BLOCK_BYTES = 1 << 19
# Between two updates of the progress bar, and between two checks for Ctrl-C.
PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class Move:
    """What becomes of one tensor: `source` cut (None: as it is), with an adapter merged first.

    Or, with a mask of the source's shape, +0.0 where that is False.
    """

    source: Stored
    target: Planned
    cut: Cut | None = None
    lora: Lora | None = None
    mask: torch.Tensor | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the source that are read: pruned rows are skipped."""
        by_row = self.cut is not None and self.cut.dim == 0 and self.lora is None
        return self.target.size if by_row else self.source.size


class Mover:
    """Moves tensors with `threads` threads; keeps its two blocks a thread between tensors."""

    def __init__(self, progress: ByteProgress, threads: int, backend: str = "auto") -> None:
        self.progress = progress
        self.threads = max(1, threads)
        self.compiled = extension() if backend != "reference" else None
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def move(self, move: Move, source: int, target: int) -> None:
        """From file descriptor `source` to `target`.

        Raises:
            OSError: reading or writing failed.
            ValueError: the source ended before the tensor did.
        """
        job = _Job.of(move)
        rows_a_piece = max(1, PIECE_BYTES // max(1, job.in_bytes))
        factors = move.lora.factors() if move.lora else None
        for begin in range(0, job.rows, rows_a_piece):
            end = min(job.rows, begin + rows_a_piece)
            try:
                if self.compiled is None or factors is not None or move.mask is not None:
                    self._by_block(job, move, factors, begin, end, source, target)
                else:
                    self._compiled(job, begin, end, source, target)
            except RuntimeError as error:
                raise ValueError(
                    f"{move.source.file} changed while it was read, tensor {move.source.name}: "
                    f"{error}; fetch it again"
                ) from None
            first, last = job.outputs(begin, end)
            rows_read = end - begin if move.bytes_read == move.source.size else last - first
            self.progress.add(rows_read * job.in_bytes + (last - first) * job.out_bytes)

    def _compiled(self, job: _Job, begin: int, end: int, source: int, target: int) -> None:
        assert self.compiled is not None
        first, last = job.outputs(begin, end)
        # An empty index has a null pointer, which the loop would take for "all".
        if first == last or not job.out_width:
            return
        block_rows = max(1, BLOCK_BYTES // max(1, job.in_bytes))
        needed = self.threads * block_rows * (job.in_bytes + job.out_bytes)
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        keep = None if job.keep_rows is None else job.keep_rows[first:last] - begin
        row_scale = None if job.row_scale is None else job.row_scale[first:last].contiguous()
        self.compiled.stream_rows(
            source,
            job.in_at + begin * job.in_bytes,
            target,
            job.out_at + first * job.out_bytes,
            end - begin,
            job.width,
            job.dtype_code,
            _pointer(keep),
            last - first,
            _pointer(row_scale),
            _pointer(job.keep_columns),
            job.out_width,
            _pointer(job.column_scale),
            self._scratch.data_ptr(),
            block_rows,
            self.threads,
            "auto",
        )

    def _by_block(
        self,
        job: _Job,
        move: Move,
        factors: tuple[torch.Tensor, torch.Tensor] | None,
        begin: int,
        end: int,
        source: int,
        target: int,
    ) -> None:
        block_rows = max(1, BLOCK_BYTES // max(1, job.in_bytes))
        for start in range(begin, end, block_rows):
            stop = min(end, start + block_rows)
            first, last = job.outputs(start, stop)
            if first == last:
                continue
            raw = bytearray((stop - start) * job.in_bytes)
            _read_all(source, raw, job.in_at + start * job.in_bytes)
            if job.dtype_code != BYTES:
                w = torch.frombuffer(raw, dtype=TORCH_DTYPES[move.source.dtype])
                w = w.reshape(stop - start, job.width)
                if move.mask is not None:
                    w.masked_fill_(~move.mask[start:stop], 0.0)
                raw = _bytes_of(job.transform(w, start, first, last, factors, move.lora))
            _write_all(target, raw, job.out_at + first * job.out_bytes)


@dataclass(frozen=True)
class _Job:
    """A move as rows and columns; without cut and adapter a row is one byte of any dtype."""

    in_at: int
    out_at: int
    rows: int
    width: int
    out_width: int
    item: int
    dtype_code: int = BYTES
    keep_rows: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    keep_columns: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None

    @property
    def in_bytes(self) -> int:
        return self.width * self.item

    @property
    def out_bytes(self) -> int:
        return self.out_width * self.item

    @staticmethod
    def of(move: Move) -> _Job:
        source, cut = move.source, move.cut
        if cut is None and move.lora is None and move.mask is None:
            return _Job(source.start, move.target.start, source.size, 1, 1, 1)
        dtype = TORCH_DTYPES[source.dtype]
        rows, width = (*source.shape, 1)[:2]
        sides: dict[str, torch.Tensor | None] = {}
        out_width = width
        if cut is not None:
            keep = cut.keep.contiguous()
            scale = None if cut.scale is None else cut.scale.float()[keep].contiguous()
            if cut.dim == 0:
                sides = {"keep_rows": keep, "row_scale": scale}
            else:
                sides = {"keep_columns": keep, "column_scale": scale}
                out_width = keep.numel()
        return _Job(
            source.start,
            move.target.start,
            rows,
            width,
            out_width,
            dtype.itemsize,
            DTYPE_CODES[dtype],
            **sides,
        )

    def outputs(self, begin: int, end: int) -> tuple[int, int]:
        """Which rows of the result the input rows [begin, end) become."""
        if self.keep_rows is None:
            return begin, end
        ends = torch.searchsorted(self.keep_rows, torch.tensor([begin, end]))
        return int(ends[0]), int(ends[1])

    def transform(
        self,
        w: torch.Tensor,
        start: int,
        first: int,
        last: int,
        factors: tuple[torch.Tensor, torch.Tensor] | None,
        lora: Lora | None,
    ) -> torch.Tensor:
        """Input rows from `start` -> result rows [first, last); one rounding, after everything."""
        dtype = w.dtype
        if factors is not None and lora is not None:
            left, right = factors
            wide = w.to(torch.promote_types(dtype, torch.float32))
            change = (left[start : start + w.shape[0]] @ right) * lora.scaling
            w = wide + change.to(wide.dtype)
        if self.keep_rows is not None:
            w = ops.gather_rows(w, self.keep_rows[first:last] - start)
        if self.row_scale is not None:
            w = scale_exactly(w, self.row_scale[first:last, None])
        if self.keep_columns is not None:
            if self.column_scale is None:
                return w[:, self.keep_columns].to(dtype)
            scale = w.new_ones(self.width, dtype=torch.float32)
            scale[self.keep_columns] = self.column_scale
            w = ops.fold_columns(w, scale, self.keep_columns)
        return w.to(dtype)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bytes_of(tensor: torch.Tensor) -> bytearray:
    return bytearray(tensor.contiguous().view(torch.uint8).numpy().data)


def _read_all(file: int, into: bytearray, at: int) -> None:
    view = memoryview(into)
    while view:
        n = os.preadv(file, [view], at)
        if n == 0:
            raise RuntimeError(f"the file ends at byte {at}")
        view, at = view[n:], at + n


def _write_all(file: int, data: bytearray, at: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(file, view, at)
        view, at = view[n:], at + n
