// How many threads a call starts.
#pragma once

#include <algorithm>
#include <cstdint>

namespace maskprune {

// At most `threads`, no more than there are items, and one for each `grain` of work: with less to
// do, a thread costs more to start than it saves.
inline int team_size(int64_t items, int64_t work, int64_t grain, int threads) {
  return int(std::max<int64_t>(1, std::min<int64_t>({threads, items, work / grain + 1})));
}

}  // namespace maskprune
