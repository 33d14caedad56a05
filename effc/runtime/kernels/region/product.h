// A few rows times a matrix of floats as it lies, [K,N] (kn) or [N,K]: each weight is read once for all rows.
//
// A number of the result is summed in the same order whatever the number of rows and threads.

#pragma once

#include <algorithm>

#include "linear.h"

namespace effc {

// Columns from which panels are twice and four times as wide: longer reads of each row of w.
constexpr int64_t kWide = 256, kWider = 1024;
constexpr int64_t kAhead = 8;  // rows of w that are asked for early: the next lies further than hardware looks

struct Table {
  const Product& op;
  const char* w;
  const float* bias;
  int64_t width, panel_bytes;

  Table(const Product& op, const Memory& memory)
      : op(op),
        w(memory.At<char>(op.w)),
        bias(memory.At<float>(op.bias)),
        width(op.nk || op.outer < kWide ? kPanel : op.outer < kWider ? 2 * kPanel : 4 * kPanel),
        panel_bytes(op.inner * width * (op.type == kF32 ? 4 : 2)) {}

  int64_t panels() const { return (op.outer + width - 1) / width; }
};

// The first `count` numbers from place `at` on, as floats; the other lanes are 0.
inline V WidenSome(const char* data, int64_t type, int64_t at, int64_t count) {
  if (type == kF32) return LoadSome(reinterpret_cast<const float*>(data) + at, count);
  uint16_t halves[kLanes] = {};
  std::memcpy(halves, data + 2 * at, 2 * count);
  return Widen(halves, type, 0);
}

template <int R>
struct Xs {
  const float* row[R];

  Xs(const Table& m, const Memory& memory, int64_t first) {
    for (int r = 0; r < R; ++r) row[r] = memory.Row(m.op.x, first + r);
  }
};

inline void Put(const Table& m, const Memory& memory, int64_t row, int64_t n, V y, int64_t count) {
  if (m.bias) y += LoadSome(m.bias + n, count);
  StoreSome(memory.Row(m.op.y, row) + n, y, count);
}

// R rows from `row` times W vectors of columns of w[K,N] from `n` on.
template <int R, int W, int TYPE>
void Columns(const Table& m, const Memory& memory, int64_t row, int64_t n) {
  const Xs<R> x(m, memory, row);
  const char* const w = m.w;
  const int64_t outer = m.op.outer, inner = m.op.inner, bytes = TYPE == kF32 ? 4 : 2;
  V y[R][W] = {};
  for (int64_t k = 0; k < inner; ++k) {
    const int64_t at = k * outer + n;
    Ask(w, (at + kAhead * outer) * bytes, W * kLanes * bytes);
#pragma GCC unroll 8
    for (int v = 0; v < W; ++v) {
      const V column = Widen(w, TYPE, at + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) y[r][v] += column * x.row[r][k];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < W; ++v) Put(m, memory, row + r, n + v * kLanes, y[r][v], kLanes);
  }
}

// The same with the last columns, fewer than a vector.
template <int R, int TYPE>
void Edge(const Table& m, const Memory& memory, int64_t row, int64_t n, int64_t count) {
  const Xs<R> x(m, memory, row);
  V y[R] = {};
  for (int64_t k = 0; k < m.op.inner; ++k) {
    const V column = WidenSome(m.w, TYPE, k * m.op.outer + n, count);
    for (int r = 0; r < R; ++r) y[r] += column * x.row[r][k];
  }
  for (int r = 0; r < R; ++r) Put(m, memory, row + r, n, y[r], count);
}

// The sums of sixteen vectors.
inline V SumAll(V* x) {
  const VI even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
  for (int count = 16; count > 1; count /= 2) {
    for (int i = 0; i < count; i += 2) {
      x[i / 2] = __builtin_shuffle(x[i], x[i + 1], even) + __builtin_shuffle(x[i], x[i + 1], odd);
    }
  }
  return x[0];
}

// R rows times J rows of w[N,K] from the n-th on, `count` of which are there.
template <int R, int J, int TYPE>
void Across(const Table& m, const Memory& memory, int64_t row, int64_t n, int64_t count) {
  const Xs<R> x(m, memory, row);
  const char* const w = m.w;
  const int64_t inner = m.op.inner, whole = inner / kLanes * kLanes;
  int64_t from[J];
  for (int j = 0; j < J; ++j) from[j] = (n + std::min<int64_t>(j, count - 1)) * inner;
  V sums[16] = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
    V xs[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) xs[r] = Load(x.row[r] + k);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const V weights = Widen(w, TYPE, from[j] + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r * J + j] += weights * xs[r];
    }
  }
  for (int j = 0; j < J && whole < inner; ++j) {
    const V weights = WidenSome(w, TYPE, from[j] + whole, inner - whole);
    for (int r = 0; r < R; ++r) sums[r * J + j] += weights * LoadSome(x.row[r] + whole, inner - whole);
  }
  float y[2 * kLanes] = {};
  Store(y, SumAll(sums));
  for (int r = 0; r < R; ++r) Put(m, memory, row + r, n, LoadSome(y + r * J, count), count);
}

// W vectors of columns from `n` on, as often as they are whole; the first column that is left.
template <int R, int W, int TYPE>
int64_t Whole(const Table& m, const Memory& memory, int64_t row, int64_t n, int64_t stop) {
  for (; n + W * kLanes <= stop; n += W * kLanes) Columns<R, W, TYPE>(m, memory, row, n);
  return n;
}

// As many sums as registers hold.
template <int R, int TYPE>
void Panel(const Table& m, const Memory& memory, int64_t row, int64_t panel) {
  constexpr int J = R == 1 ? 16 : R == 2 ? 8 : 4, W = R <= 2 ? 8 : 4;
  const int64_t stop = std::min(m.op.outer, (panel + 1) * m.width);
  int64_t n = panel * m.width;
  if (m.op.nk) {
    for (; n < stop; n += J) Across<R, J, TYPE>(m, memory, row, n, std::min<int64_t>(J, stop - n));
    return;
  }
  n = Whole<R, W, TYPE>(m, memory, row, n, stop);
  n = Whole<R, 4, TYPE>(m, memory, row, n, stop);
  n = Whole<R, 2, TYPE>(m, memory, row, n, stop);
  n = Whole<R, 1, TYPE>(m, memory, row, n, stop);
  if (n < stop) Edge<R, TYPE>(m, memory, row, n, stop - n);
}

template <int TYPE>
void PanelRows(const Table& m, const Memory& memory, int64_t panel) {
  for (int64_t r = 0; r < m.op.rows; r += kRowBlock) {
    switch (m.op.rows - r) {
      case 1: Panel<1, TYPE>(m, memory, r, panel); break;
      case 2: Panel<2, TYPE>(m, memory, r, panel); break;
      case 3: Panel<3, TYPE>(m, memory, r, panel); break;
      default: Panel<4, TYPE>(m, memory, r, panel);
    }
  }
}

inline int64_t Tasks(const Product& op, const Memory& memory, int64_t threads) {
  return TasksOf(Table(op, memory), threads);
}

inline void Run(const Product& op, const Memory& memory, int64_t threads, int64_t task) {
  const auto rows = op.type == kF32 ? PanelRows<kF32> : op.type == kF16 ? PanelRows<kF16> : PanelRows<kBF16>;
  RunPanels(Table(op, memory), memory, threads, task, rows);
}

}  // namespace effc
