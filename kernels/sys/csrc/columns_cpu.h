// Sums over rows on the CPU: partial sums of neighbouring rows, whatever the number of threads.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "fused.h"

namespace fused_cpu {

// Elements that one thread takes at least: below, starting it costs more.
constexpr int64_t kGrain = 1 << 14;

// Runs body(first row, end row, sums): each part of the rows with its own `sums * columns` partial sums, all 0
// before. Without `partials` rows are divided as threads want them, and `sums` is null.
template <typename Body>
void for_rows(int64_t rows, int64_t columns, int64_t sums, float *partials, const Body &body) {
  if (partials == nullptr) {
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / columns),
                     [&](int64_t first, int64_t end) { body(first, end, static_cast<float *>(nullptr)); });
    return;
  }
  at::parallel_for(0, fused_parts(rows), 1, [&](int64_t first, int64_t end) {
    for (int64_t part = first; part < end; ++part) {
      float *own = partials + part * sums * columns;
      std::fill(own, own + sums * columns, 0.0f);
      body(fused_part_begin(rows, part), fused_part_begin(rows, part + 1), own);
    }
  });
}

}  // namespace fused_cpu
