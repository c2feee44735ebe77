// Rows of one tensor from file to file, cut and folded on the way, in blocks that stay in cache.
//
// pread and pwrite, not mmap: a file that is cut short while it is read is then an error to report,
// not a SIGBUS, and the memory in use stays at two blocks per thread.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>

#include "fold.hpp"
#include "threads.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace maskprune {
namespace {

int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Bytes; shorter kept rows are picked out of a block that is read whole.
constexpr int64_t long_row = 4096;

void read_all(int file, char* to, int64_t bytes, int64_t at) {
  while (bytes > 0) {
    const ssize_t n = pread(file, to, bytes, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw std::system_error(errno, std::generic_category(), "reading");
    if (n == 0) throw std::runtime_error("the file ends at byte " + std::to_string(at));
    to += n, at += n, bytes -= n;
  }
}

void write_all(int file, const char* from, int64_t bytes, int64_t at) {
  while (bytes > 0) {
    const ssize_t n = pwrite(file, from, bytes, at);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw std::system_error(errno, std::generic_category(), "writing");
    from += n, at += n, bytes -= n;
  }
}

struct Job {
  int in_file, out_file;
  int64_t in_at, out_at, rows, in_bytes, out_bytes;  // bytes of one row
  const int64_t* keep_rows;                          // (kept_rows,) ascending, or null: all rows
  int64_t kept_rows;
  const float* row_scale;  // (kept_rows,) or null
  Columns columns;
  Dtype dtype;
  Isa isa;
  bool folds;  // else rows are copied as they are
};

// Input rows [from, to): reads those that stay next to each other into `in`, and writes them.
void one_block(const Job& job, int64_t from, int64_t to, char* in, char* out) {
  int64_t first = from, last = to;  // which rows of the output
  if (job.keep_rows) {
    first = std::lower_bound(job.keep_rows, job.keep_rows + job.kept_rows, from) - job.keep_rows;
    last = std::lower_bound(job.keep_rows, job.keep_rows + job.kept_rows, to) - job.keep_rows;
  }
  const int64_t n = last - first;
  if (n == 0) return;
  if (!job.keep_rows || job.in_bytes < long_row) {
    read_all(job.in_file, in, (to - from) * job.in_bytes, job.in_at + from * job.in_bytes);
    for (int64_t r = 0; job.keep_rows && r < n; ++r) {
      const char* row = in + (job.keep_rows[first + r] - from) * job.in_bytes;
      std::memmove(in + r * job.in_bytes, row, job.in_bytes);
    }
  } else {
    for (int64_t r = 0; r < n;) {
      int64_t run = 1;
      const int64_t begin = job.keep_rows[first + r];
      while (r + run < n && job.keep_rows[first + r + run] == begin + run) ++run;
      read_all(job.in_file, in + r * job.in_bytes, run * job.in_bytes,
               job.in_at + begin * job.in_bytes);
      r += run;
    }
  }
  const char* result = in;
  if (job.folds) {
    for (int64_t r = 0; r < n; ++r)
      fold_row(in + r * job.in_bytes, out + r * job.out_bytes, job.columns, job.dtype, job.isa,
               job.row_scale ? job.row_scale + first + r : nullptr);
    result = out;
  }
  write_all(job.out_file, result, n * job.out_bytes, job.out_at + first * job.out_bytes);
}

}  // namespace

// A tensor (rows, width) at byte `in_at` of `in_file` -> (kept_rows, kept_columns) at `out_at` of
// `out_file`. What is neither cut nor multiplied may be given as Dtype::bytes.
// scratch: threads * (block_rows input rows + block_rows output rows) bytes.
void stream_rows(int in_file, int64_t in_at, int out_file, int64_t out_at, int64_t rows,
                 int64_t width, int dtype, uintptr_t keep_rows, int64_t kept_rows,
                 uintptr_t row_scale, uintptr_t keep_columns, int64_t kept_columns,
                 uintptr_t column_scale, uintptr_t scratch, int64_t block_rows, int threads,
                 const std::string& isa_name) {
  const bool folds = row_scale || keep_columns || column_scale;
  if (rows < 0 || width < 0 || block_rows < 1 || threads < 1)
    throw std::invalid_argument("stream_rows: a size is out of range");
  if (dtype < (folds ? 0 : -1) || dtype > 3)
    throw std::invalid_argument("stream_rows: dtype code " + std::to_string(dtype) +
                                " is unknown or cannot be multiplied");
  if (!keep_columns) kept_columns = width;
  if (!keep_rows) kept_rows = rows;
  const auto* index = at<int64_t>(keep_rows);
  for (int64_t j = 0; index && j < kept_rows; ++j)
    if (index[j] < 0 || index[j] >= rows || (j > 0 && index[j] <= index[j - 1]))
      throw std::invalid_argument("stream_rows: kept rows must ascend within 0 to " +
                                  std::to_string(rows - 1));
  const Isa isa = choose_isa("stream_rows", isa_name);
  const int64_t item = item_size(Dtype(dtype));
  const Job job{in_file,
                out_file,
                in_at,
                out_at,
                rows,
                width * item,
                kept_columns * item,
                index,
                kept_rows,
                at<float>(row_scale),
                make_columns(width, at<int64_t>(keep_columns), kept_columns,
                             at<float>(column_scale), isa),
                Dtype(dtype),
                isa,
                folds};
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  const int64_t share = block_rows * (job.in_bytes + job.out_bytes);
  const int team = team_size(blocks, blocks, 1, threads);
  std::exception_ptr failure;
  bool failed = false;
#pragma omp parallel for schedule(dynamic) num_threads(team)
  for (int64_t b = 0; b < blocks; ++b) {
    bool stop;
#pragma omp atomic read
    stop = failed;
    if (stop) continue;
    const ExactFloats exact;
    char* in = at<char>(scratch, thread_number() * share);
    try {
      one_block(job, b * block_rows, std::min(rows, (b + 1) * block_rows), in,
                in + block_rows * job.in_bytes);
    } catch (...) {
#pragma omp critical(maskprune_stream_failure)
      if (!failure) failure = std::current_exception();
#pragma omp atomic write
      failed = true;
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace maskprune
