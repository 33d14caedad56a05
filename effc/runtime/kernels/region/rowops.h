// Ops on one row: norms, rotations, cache rows, elementwise functions, the place of the largest.

#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "program.h"
#include "rows.h"

namespace effc {

inline float Mean(const float* x, int64_t width) {
  V total = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) total += Load(x + i);
  return (Sum(total) + Sum(i < width ? LoadSome(x + i, width - i) : V{})) / static_cast<float>(width);
}

inline float MeanSquare(const float* x, int64_t width, float mean) {
  V total = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) total += (Load(x + i) - mean) * (Load(x + i) - mean);
  float rest = 0;
  for (; i < width; ++i) rest += (x[i] - mean) * (x[i] - mean);
  return (Sum(total) + rest) / static_cast<float>(width);
}

// Branches are outside the loop: a compiler that makes them masked loads of a null pointer makes them slow.
inline void NormHead(const Norm& op, const float* x, float* y, const float* scale, const float* bias) {
  const float mean = op.layer ? Mean(x, op.width) : 0.0f, offset = static_cast<float>(Number(op.offset));
  const float factor = 1.0f / std::sqrt(MeanSquare(x, op.width, mean) + static_cast<float>(Number(op.eps)));
  for (int64_t i = 0; i < op.width; i += kLanes) {
    const int64_t count = std::min(kLanes, op.width - i);
    V value = (LoadSome(x + i, count) - mean) * factor;
    if (scale) value *= LoadSome(scale + i, count) + offset;
    if (bias) value += LoadSome(bias + i, count);
    StoreSome(y + i, value, count);
  }
}

inline void Run(const Norm& op, const Memory& memory, int64_t row) {
  const float *scale = memory.At<float>(op.scale), *bias = memory.At<float>(op.bias);
  for (int64_t h = 0; h < op.heads; ++h) {
    NormHead(op, memory.Row(op.x, row) + h * op.width, memory.Row(op.y, row) + h * op.width, scale, bias);
  }
}

inline void TurnHead(const Rope& op, const float* x, const float* cos, const float* sin, float* y) {
  const int64_t first = op.interleaved ? 2 : 1, second = op.interleaved ? 1 : op.half;
  int64_t i = 0;
  for (; !op.interleaved && i + kLanes <= op.half; i += kLanes) {
    const V a = Load(x + i), b = Load(x + i + second), c = Load(cos + i), s = Load(sin + i);
    Store(y + i, a * c - b * s);
    Store(y + i + second, b * c + a * s);
  }
  for (; i < op.half; ++i) {
    const float a = x[first * i], b = x[first * i + second];
    y[first * i] = a * cos[i] - b * sin[i];
    y[first * i + second] = b * cos[i] + a * sin[i];
  }
  for (i = 2 * op.half; i < op.width; ++i) y[i] = x[i];
}

inline void Run(const Rope& op, const Memory& memory, int64_t row) {
  const float *cos = memory.At<float>(op.cos) + row * op.half, *sin = memory.At<float>(op.sin) + row * op.half;
  for (int64_t h = 0; h < op.heads; ++h) {
    TurnHead(op, memory.Row(op.x, row) + h * op.width, cos, sin, memory.Row(op.y, row) + h * op.width);
  }
}

// Rows start where dynamic_update_slice would put them: moved inwards at the end.
inline void Run(const Append& op, const Memory& memory, int64_t row) {
  const int64_t sequence = row / op.tokens, length = memory.At<int32_t>(op.lengths)[sequence];
  const int64_t at = std::max<int64_t>(0, std::min(length, op.capacity - op.tokens)) + row % op.tokens;
  const float* x = memory.Row(op.x, row);
  for (int64_t g = 0; g < op.heads; ++g) {
    const int64_t before = (sequence * op.heads + g) * op.capacity + at;
    Keep(x + g * op.width, op.kind, op.width, memory.At<char>(op.cache) + before * RowBytes(op.kind, op.width));
  }
}

enum Function : int64_t {
  kAdd, kSub, kMul, kDiv, kMax, kMin, kNeg, kExp, kTanh, kLogistic, kSquare, kCube, kSqrt, kRsqrt, kErf, kErfc, kCopy,
  kReached,  // 1 where a is b or more, and b less than 1
  kDiffers   // 1 where a is other than b
};

inline V Each(V x, float (*f)(float)) {
  for (int i = 0; i < kLanes; ++i) x[i] = f(x[i]);
  return x;
}

// As XLA has them: NaN in either operand is the result.
inline V Larger(V a, V b) { return a != a ? a : b != b ? b : Max(a, b); }
inline V Smaller(V a, V b) { return a != a ? a : b != b ? b : Min(a, b); }

template <int64_t FUNCTION>
inline V Apply(V a, V b) {
  switch (FUNCTION) {
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    case kDiv: return a / b;
    case kMax: return Larger(a, b);
    case kMin: return Smaller(a, b);
    case kNeg: return -a;
    case kExp: return Exp(a);
    case kTanh: return Tanh(a);
    case kLogistic: return Logistic(a);
    case kSquare: return a * a;
    case kCube: return a * a * a;
    case kSqrt: return Each(a, std::sqrt);
    case kRsqrt: return 1.0f / Each(a, std::sqrt);
    case kErf: return Each(a, std::erf);
    case kErfc: return Each(a, std::erfc);
    case kReached: return a >= b ? b < 1.0f ? Fill(1.0f) : V{} : V{};
    case kDiffers: return a != b ? Fill(1.0f) : V{};
    default: return a;
  }
}

// Which function it is is asked outside the loop.
template <int64_t FUNCTION>
void Mapped(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t width, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Store(y + i, Apply<FUNCTION>(a_step ? Load(a + i) : Fill(*a), b_step ? Load(b + i) : Fill(*b)));
  }
  if (i == width) return;
  const V first = a_step ? LoadSome(a + i, width - i) : Fill(*a), second = b_step ? LoadSome(b + i, width - i) : Fill(*b);
  StoreSome(y + i, Apply<FUNCTION>(first, second), width - i);
}

template <size_t... FUNCTIONS>
constexpr auto AllMapped(std::index_sequence<FUNCTIONS...>) {
  return std::array{Mapped<FUNCTIONS>...};
}

inline void Run(const Map& op, const Memory& memory, int64_t row) {
  static constexpr auto kMapped = AllMapped(std::make_index_sequence<kDiffers + 1>());
  const auto number = static_cast<float>(Number(op.number));
  const float* a = op.a.at.base == -2 ? &number : memory.Row(op.a, row);
  const float* b = op.b.at.base == -2 ? &number : memory.Row(op.b, row);
  kMapped[op.function](a, op.a_step, b, op.b_step, op.width, memory.Row(op.y, row));
}

// The first of the largest, or the first NaN: the first stretch that has it is looked through once more.
inline int32_t First(const float* x, int64_t width) {
  constexpr int64_t kStretch = 64 * kLanes;
  float largest = -std::numeric_limits<float>::infinity();
  int64_t found = 0;
  for (int64_t from = 0; from < width; from += kStretch) {
    const int64_t stop = std::min(width, from + kStretch);
    V most = Fill(largest);
    VI odd = {};
    int64_t i = from;
    for (; i + kLanes <= stop; i += kLanes) {
      const V value = Load(x + i);
      most = Max(value, most);
      odd |= value != value;
    }
    float here = Largest(most);
    bool nan = Highest(-odd) != 0;
    for (; i < stop; ++i) {
      nan |= x[i] != x[i];
      here = std::max(here, x[i]);
    }
    if (nan) return static_cast<int32_t>(std::find_if(x + from, x + stop, [](float one) { return one != one; }) - x);
    if (here > largest) largest = here, found = from;
  }
  const float* at = std::find(x + found, x + std::min(width, found + kStretch), largest);
  return at < x + width ? static_cast<int32_t>(at - x) : 0;
}

inline void Run(const Argmax& op, const Memory& memory, int64_t row) {
  memory.At<int32_t>(op.y)[row] = First(memory.Row(op.x, row), op.width);
}

inline void Run(const Turns& op, const Memory& memory, int64_t row) {
  const float *freq = memory.At<float>(op.freq), at = static_cast<float>(memory.At<int32_t>(op.positions)[row]);
  const auto scale = static_cast<float>(Number(op.scale));
  float* y = memory.Row(op.y, row);
  for (int64_t i = 0; i < op.width; ++i) y[i] = (op.sine ? std::sin(at * freq[i]) : std::cos(at * freq[i])) * scale;
}

inline void Run(const Count& op, const Memory& memory, int64_t row) {
  const int32_t begin = memory.At<int32_t>(op.x)[row] + static_cast<int32_t>(op.start);
  for (int64_t i = 0; i < op.count; ++i) memory.At<int32_t>(op.y)[row * op.count + i] = begin + static_cast<int32_t>(i);
}

}  // namespace effc
