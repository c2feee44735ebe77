// The least-s prox of one row, included once per instruction set (least_s_prox.cpp), each time in
// its own namespace and with these names defined:
//   TARGET          the function attribute that selects the instruction set
//   VECTOR_BYTES    its vector width
//   compress_into   (ivec keys, ivec chosen, int32_t* out) -> number stored; may write a full
//                   vector at out
// A key is the bits of |m| as an integer. Keys have the order of |m|, so the search counts integers
// and is exact for any data; a NaN is a key above that of infinity.

using fvec = float __attribute__((vector_size(VECTOR_BYTES)));
using ivec = int32_t __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t lanes = VECTOR_BYTES / 4;

TARGET static inline ivec load_keys(const bits_view* bits) {
  ivec v;
  __builtin_memcpy(&v, bits, sizeof v);
  return v & 0x7fffffff;
}

TARGET static inline ivec splat(int32_t x) { return ivec{} + x; }

TARGET static inline int64_t sum_lanes(ivec v) {
  int64_t total = 0;
  for (int64_t j = 0; j < lanes; ++j) total += v[j];
  return total;
}

TARGET static int64_t count_at_most(const bits_view* bits, int64_t n, int32_t limit) {
  ivec count[2] = {};
  const int64_t whole = n - n % (2 * lanes);
  for (int64_t i = 0; i < whole; i += 2 * lanes) {
    count[0] -= load_keys(bits + i) <= limit;
    count[1] -= load_keys(bits + i + lanes) <= limit;
  }
  int64_t total = sum_lanes(count[0] + count[1]);
  for (int64_t i = whole; i < n; ++i) total += (bits[i] & 0x7fffffff) <= limit;
  return total;
}

struct Extremes {
  int32_t smallest, largest;
};

TARGET static Extremes extremes(const bits_view* bits, int64_t n) {
  ivec low = splat(INT32_MAX), high = splat(0);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const ivec key = load_keys(bits + i);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  Extremes e{INT32_MAX, 0};
  for (int64_t j = 0; j < lanes; ++j) {
    e.smallest = std::min<int32_t>(e.smallest, low[j]);
    e.largest = std::max<int32_t>(e.largest, high[j]);
  }
  for (; i < n; ++i) {
    e.smallest = std::min(e.smallest, bits[i] & 0x7fffffff);
    e.largest = std::max(e.largest, bits[i] & 0x7fffffff);
  }
  return e;
}

struct Bracket {
  int64_t below, kept;
  int32_t largest;
};

// Counts the keys below lo, stores those in [lo, hi] and finds the largest of all, in one pass.
TARGET static Bracket bracket(const bits_view* bits, int64_t n, int32_t lo, int32_t hi,
                              int32_t* out) {
  ivec below = {}, high = {};
  int64_t kept = 0, i = 0;
  for (; i + lanes <= n; i += lanes) {
    const ivec key = load_keys(bits + i);
    below -= key < lo;
    high = key > high ? key : high;
    kept += compress_into(key, (key >= lo) & (key <= hi), out + kept);
  }
  Bracket b{sum_lanes(below), kept, 0};
  for (int64_t j = 0; j < lanes; ++j) b.largest = std::max<int32_t>(b.largest, high[j]);
  for (; i < n; ++i) {
    const int32_t key = bits[i] & 0x7fffffff;
    b.below += key < lo;
    b.largest = std::max(b.largest, key);
    out[b.kept] = key;
    b.kept += key >= lo && key <= hi;
  }
  return b;
}

// The search keeps count(key < lo) = below < k <= at_most = count(key <= hi).
struct Search {
  int32_t lo, hi;
  int64_t below, at_most;
};

// Halves [lo, hi] until one key is left or exactly k keys are at most hi.
TARGET static void bisect(const bits_view* bits, int64_t n, int64_t offset, int64_t k, Search& q) {
  while (q.lo < q.hi && q.at_most != k) {
    const int32_t mid = q.lo + (q.hi - q.lo) / 2;
    const int64_t c = offset + count_at_most(bits, n, mid);
    if (c >= k) {
      q.hi = mid;
      q.at_most = c;
    } else {
      q.lo = mid + 1;
      q.below = c;
    }
  }
}

TARGET static int32_t sample_quantile(const int32_t* sample, int64_t rank, const Search& q) {
  if (rank < 1) return q.lo;
  if (rank > sample_size) return q.hi;
  Search in_sample{q.lo, q.hi, 0, sample_size};
  bisect(sample, sample_size, 0, rank, in_sample);
  return in_sample.hi;
}

// A key T = hi such that the k smallest are those below T and the first k - below equal to T.
// `largest` becomes the row's largest key; above infinity_key it is a NaN, and the result is void.
TARGET static Search search(const bits_view* bits, int64_t n, int64_t k, int32_t* scratch,
                            int32_t& largest) {
  Search q{0, infinity_key, 0, n};
  const bits_view* from = bits;
  int64_t m = n, offset = 0;
  largest = -1;
  // A sample brackets the k-th key and one pass keeps the few inside: three passes in all. A
  // sample that misleads costs a pass and never the answer; two of them end in plain bisection.
  for (int round = 0; round < 3 && m > short_row && q.lo < q.hi && q.at_most != k; ++round) {
    int32_t sample[sample_size];
    const int64_t step = (m - sample_run) / (sample_size / sample_run - 1);
    for (int64_t j = 0; j < sample_size / sample_run; ++j)
      for (int64_t t = 0; t < sample_run; ++t)
        sample[j * sample_run + t] = from[j * step + t] & 0x7fffffff;
    const double p = double(k - offset) / double(m);
    const double rank = p * sample_size;
    const double margin = 1.0 + (2.2 + 2.0 * round) * std::sqrt(sample_size * p * (1.0 - p));
    const int32_t lo = sample_quantile(sample, int64_t(std::floor(rank - margin)), q);
    const int32_t hi = sample_quantile(sample, int64_t(std::ceil(rank + margin)), q);
    int32_t* into = from == scratch ? scratch + n : scratch;
    const Bracket b = bracket(from, m, lo, hi, into);
    if (largest < 0) {
      largest = b.largest;
      if (largest > infinity_key) return q;
    }
    if (k - offset <= b.below) {
      q.hi = lo - 1;
      q.at_most = offset + b.below;
    } else if (k - offset > b.below + b.kept) {
      q.lo = hi + 1;
      q.below = offset + b.below + b.kept;
    } else {
      offset += b.below;
      from = into;
      m = b.kept;
      q = Search{lo, hi, offset, offset + m};
    }
  }
  if (largest < 0) {
    const Extremes e = extremes(bits, n);
    largest = e.largest;
    if (largest > infinity_key) return q;
    q.lo = e.smallest;
    q.hi = e.largest;
  }
  bisect(from, m, offset, k, q);
  return q;
}

// One past the index of the count-th key equal to T.
TARGET static int64_t cut_after(const bits_view* bits, int64_t n, int32_t T, int64_t count) {
  constexpr int64_t block = 64 * lanes;
  int64_t i = 0;
  for (; i + block <= n; i += block) {
    ivec equal = {};
    for (int64_t j = 0; j < block; j += lanes) equal -= load_keys(bits + i + j) == T;
    const int64_t c = sum_lanes(equal);
    if (c >= count) break;
    count -= c;
  }
  for (; count > 0; ++i) count -= (bits[i] & 0x7fffffff) == T;
  return i;
}

// Lanes of a sum whose order is the same for every instruction set.
struct Sums {
  double lane[square_lanes];
  int32_t next;
};

// Shrinks the entries of keys at most T; adds their squares; finds the smallest key left.
TARGET static void shrink_range(float* m, int64_t n, int32_t T, float shrink, Sums& sums) {
  constexpr int64_t vectors = square_lanes / lanes;
  ivec next = splat(INT32_MAX);
  int64_t i = 0;
  while (i + square_lanes <= n) {
    // Float lanes are emptied into double ones before their rounding can add up.
    const int64_t end = std::min(n - n % square_lanes, i + square_run);
    fvec acc[vectors] = {};
    for (; i < end; i += square_lanes) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) {
        float* at = m + i + v * lanes;
        fvec x;
        __builtin_memcpy(&x, at, sizeof x);
        ivec key;
        __builtin_memcpy(&key, at, sizeof key);
        key &= 0x7fffffff;
        const ivec chosen = key <= T;
        const fvec shrunk = x * shrink;
        const fvec y = chosen ? shrunk : x;
        acc[v] += chosen ? shrunk * shrunk : fvec{};
        const ivec left = chosen ? splat(INT32_MAX) : key;
        next = left < next ? left : next;
        __builtin_memcpy(at, &y, sizeof y);
      }
    }
    for (int64_t j = 0; j < square_lanes; ++j) sums.lane[j] += acc[j / lanes][j % lanes];
  }
  for (int64_t j = 0; j < lanes; ++j) sums.next = std::min<int32_t>(sums.next, next[j]);
  for (int64_t j = 0; i < n; ++i, ++j) {
    int32_t key;
    std::memcpy(&key, m + i, sizeof key);
    key &= 0x7fffffff;
    if (key <= T) {
      m[i] *= shrink;
      sums.lane[j] += m[i] * m[i];
    } else {
      sums.next = std::min(sums.next, key);
    }
  }
}

TARGET static RowSums prox_row(float* m, int64_t n, int64_t k, float shrink, int32_t* scratch) {
  // The search only reads the floats' bits, through may_alias vectors and this view.
  const bits_view* bits = reinterpret_cast<const bits_view*>(m);
  int32_t largest;
  Sums sums{{}, INT32_MAX};
  if (k == 0) {
    const Extremes e = extremes(bits, n);
    if (e.largest > infinity_key) return not_a_number();
    return {0.0f, square_of_key(e.smallest)};
  }
  const Search q = search(bits, n, k, scratch, largest);
  if (largest > infinity_key) return not_a_number();
  const int64_t cut = q.at_most == k ? n : cut_after(bits, n, q.hi, k - q.below);
  shrink_range(m, cut, q.hi, shrink, sums);
  if (cut < n) shrink_range(m + cut, n - cut, q.hi - 1, shrink, sums);
  double total = 0.0;
  for (double lane : sums.lane) total += lane;
  if (k < n) return {float(total), square_of_key(sums.next)};
  const float top = value_of_key(largest) * shrink;
  return {float(total), top * top};
}

TARGET static bool has_nan(const float* m, int64_t n) {
  return extremes(reinterpret_cast<const bits_view*>(m), n).largest > infinity_key;
}

TARGET static void clamp(float* m, int64_t n) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    fvec x;
    __builtin_memcpy(&x, m + i, sizeof x);
    x = x > 0.0f ? x : fvec{};
    x = x < 1.0f ? x : fvec{} + 1.0f;
    __builtin_memcpy(m + i, &x, sizeof x);
  }
  for (; i < n; ++i) m[i] = std::min(std::max(m[i], 0.0f), 1.0f);
}
