// Ops that decide: how sure logits are, a classifier's score, which of two rows is taken, whether a branch runs.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "program.h"

namespace effc {

// The largest two, one of them twice where it is there twice.
struct Two {
  float most = -std::numeric_limits<float>::infinity(), next = most;

  void See(float x) {
    next = std::max(next, std::min(most, x));
    most = std::max(most, x);
  }
};

inline Two Largest(const float* x, int64_t width) {
  V most = Fill(-std::numeric_limits<float>::infinity()), next = most;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const V value = Load(x + i);
    next = Max(Min(value, most), next);
    most = Max(value, most);
  }
  Two two;
  for (int lane = 0; lane < kLanes; ++lane) two.See(most[lane]), two.See(next[lane]);
  for (; i < width; ++i) two.See(x[i]);
  return two;
}

inline void Run(const Sure& op, const Memory& memory, int64_t row) {
  const float* x = memory.Row(op.x, row);
  const Two two = Largest(x, op.width);
  V sums = {};
  int64_t i = 0;
  for (; i + kLanes <= op.width; i += kLanes) sums += Exp(Load(x + i) - two.most);
  float total = Sum(sums);
  for (; i < op.width; ++i) total += std::exp(x[i] - two.most);
  *memory.Row(op.y, row) = (1.0f - (op.margin ? std::exp(two.next - two.most) : 0.0f)) / total;
}

inline void Run(const Select& op, const Memory& memory, int64_t row) {
  const View& from = *memory.Row(op.where, row) != 0.0f ? op.a : op.b;
  std::memcpy(memory.Row(op.y, row), memory.Row(from, row), op.width * sizeof(float));
}

inline void Run(const Dense& op, const Memory& memory, int64_t row) {
  const float *x = memory.Row(op.x, row), *w = memory.At<float>(op.w), *bias = memory.At<float>(op.bias);
  float* y = memory.Row(op.y, row);
  for (int64_t j = 0; j < op.outer; ++j) {
    float sums[4] = {};
    int64_t k = 0;
    for (; k + 4 <= op.inner; k += 4) {
      for (int i = 0; i < 4; ++i) sums[i] += x[k + i] * w[(k + i) * op.outer + j];
    }
    for (; k < op.inner; ++k) sums[0] += x[k] * w[k * op.outer + j];
    y[j] = sums[0] + sums[1] + sums[2] + sums[3] + (bias ? bias[j] : 0.0f);
  }
}

inline bool All(const Decide& op, const Memory& memory) {
  for (int64_t row = 0; row < op.rows; ++row) {
    if (*memory.Row(op.x, row) == 0.0f) return false;
  }
  return true;
}

}  // namespace effc
