// Rows of tables by number: what tokens are to the layers.

#pragma once

#include <algorithm>
#include <limits>

#include "program.h"

namespace effc {

inline void FloatRow(const Embed& op, const Memory& memory, int64_t id, float* y) {
  const char* row = memory.At<char>(op.table) + id * op.width * (op.type == kF32 ? 4 : 2);
  int64_t i = 0;
  for (; i + kLanes <= op.width; i += kLanes) Store(y + i, Widen(row, op.type, i));
  for (; i < op.width; ++i) y[i] = WidenOne(row, op.type, i);
}

// Codes of a column of a panel, four at a time: see effc/runtime/packed.py.
inline void CodedRow(const Embed& op, const Memory& memory, int64_t id, float* y) {
  const int64_t panel = id / 32, column = id % 32, quads = op.width / 4, bytes = op.bits <= 4 ? 64 : 128;
  const int64_t groups = (op.width + op.group - 1) / op.group, middle = op.bits <= 4 ? 8 : 128;
  const int64_t at = 4 * (column % 16) + (op.bits > 4 && column >= 16 ? 64 : 0), shift = column >= 16 ? 4 : 0;
  const uint8_t* codes = memory.At<uint8_t>(op.table) + panel * quads * bytes + at;
  const char *scales = memory.At<char>(op.scales), *zeros = memory.At<char>(op.zeros);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t place = (panel * groups + g) * 32 + column, stop = std::min(op.width, (g + 1) * op.group);
    const float scale = WidenOne(scales, op.type, place), zero = zeros ? WidenOne(zeros, op.type, place) : 0.0f;
    for (int64_t k = g * op.group; k < stop; ++k) {
      const int64_t byte = codes[k / 4 * bytes + k % 4], code = op.bits <= 4 ? byte >> shift & 15 : byte;
      y[k] = (static_cast<float>(code - middle) - zero) * scale;
    }
  }
}

// As `take` has it: numbers below 0 count from the end, and what is not there is NaN.
inline void Run(const Embed& op, const Memory& memory, int64_t row) {
  const int64_t asked = memory.At<int32_t>(op.ids)[row], id = asked < 0 ? asked + op.vocab : asked;
  float* y = memory.Row(op.y, row);
  if (id < 0 || id >= op.vocab) {
    std::fill(y, y + op.width, std::numeric_limits<float>::quiet_NaN());
  } else if (op.bits) {
    CodedRow(op, memory, id, y);
  } else {
    FloatRow(op, memory, id, y);
  }
}

}  // namespace effc
