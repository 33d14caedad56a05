// Rows times a packed matrix (effc/runtime/packed.py tells the layout), in integers.
//
// A row is cut in pieces that lie in one group of weights; each becomes integers of one or two signed
// bytes with a scale of its own. Products with unsigned codes are exact; what the codes' offset adds is
// taken away with the piece's sum. Rows that integers cannot hold (infinities, NaN) are done in floats.

#pragma once

#include <algorithm>

#include "program.h"

namespace effc {

constexpr int64_t kPanel = 32;  // columns stored together
constexpr int64_t kRowBlock = 4;

// One row as integers: the high digits, the low ones, then scales and sums a piece, then a flag.
struct Digits {
  int8_t* digit[2];
  float* scale;
  int32_t* sum;
  int32_t* odd;
};

inline Digits RowDigits(char* at, int64_t width, int64_t piece, int64_t digits) {
  const int64_t wide = (width + 63) / 64 * 64, pieces = (width + piece - 1) / piece;
  auto* codes = reinterpret_cast<int8_t*>(at);
  auto* scale = reinterpret_cast<float*>(at + digits * wide);
  auto* sum = reinterpret_cast<int32_t*>(scale + pieces);
  return {{codes, codes + (digits - 1) * wide}, scale, sum, sum + pieces};
}

inline float Magnitude(const float* x, int64_t count) {
  VI most = {};
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const VI bits = Bits(Load(x + k)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  if (k < count) {
    const VI bits = Bits(LoadSome(x + k, count - k)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const int32_t all = Highest(most);
  return LoadAs<float>(&all);
}

template <int D>
inline int32_t Round(const float* x, int64_t count, float inverse, int8_t* high, int8_t* low) {
  int32_t sum = 0;
  int64_t k = 0;
#ifdef EFFC_AVX512
  VI sums = {};
  for (; k + kLanes <= count; k += kLanes) {
    V near = Load(x + k) * inverse;
    if (D == 1) near = Min(Max(near, Fill(-127.0f)), Fill(127.0f));
    const auto q = reinterpret_cast<VI>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(near)));  // ties to even
    sums += q;
    const auto bytes = [](VI all, int8_t* to) {
      const __m128i narrow = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(all));
      std::memcpy(to, &narrow, sizeof narrow);
    };
    if (D == 2) bytes(q, low + k);
    bytes(D == 2 ? (q - ((q << 24) >> 24)) >> 8 : q, high + k);
  }
  sum = _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(sums));
#endif
  for (; k < count; ++k) {
    const float near = std::nearbyint(x[k] * inverse);
    const int32_t q = static_cast<int32_t>(D == 2 ? near : std::min(127.0f, std::max(-127.0f, near)));
    sum += q;
    if (D == 2) low[k] = static_cast<int8_t>(q);
    high[k] = static_cast<int8_t>(D == 2 ? (q - static_cast<int8_t>(q)) >> 8 : q);
  }
  return sum;
}

// Two digits reach 127 * 256: one more would not fit the high byte. One has the greatest half a step past its last
// code, as fake_quant does (effc/runtime/rounding.py).
inline void Run(const Quantize& op, const Memory& memory, int64_t row) {
  const float* x = memory.Row(op.x, row);
  const Digits to = RowDigits(memory.At<char>(op.to) + row * op.block, op.width, op.piece, op.digits);
  const float most = op.digits == 2 ? 127.0f * 256.0f : 127.5f;
  *to.odd = 0;
  for (int64_t k = 0, p = 0; k < op.width; k += op.piece, ++p) {
    const int64_t count = std::min(op.piece, op.width - k);
    const float size = Magnitude(x + k, count);
    if (!(size < 1e30f)) *to.odd = 1;
    const bool plain = size < 1e30f && size > 1e-30f;
    const float inverse = plain ? most / size : 0.0f;
    to.scale[p] = plain ? size / most : 0.0f;
    static const float zeros[128] = {};
    const float* from = plain ? x + k : zeros;
    int8_t *high = to.digit[0] + k, *low = to.digit[1] + k;
    to.sum[p] = op.digits == 2 ? Round<2>(from, count, inverse, high, low) : Round<1>(from, count, inverse, high, low);
  }
}

struct Matrix {
  const Linear& op;
  const uint8_t* codes;
  const char *scales, *zeros;
  const float* bias;
  int64_t groups, panel_bytes, quads;

  Matrix(const Linear& op, const Memory& memory)
      : op(op),
        codes(memory.At<uint8_t>(op.codes)),
        scales(memory.At<char>(op.scales)),
        zeros(memory.At<char>(op.zeros)),
        bias(memory.At<float>(op.bias)),
        groups((op.inner + op.group - 1) / op.group),
        panel_bytes(op.inner * kPanel * (op.bits <= 4 ? 4 : 8) / 8),
        quads(op.inner / 4) {}

  int64_t panels() const { return (op.outer + kPanel - 1) / kPanel; }
  V Scale(int64_t panel, int64_t g, int v) const { return Value(scales, panel, g, v); }
  V Zero(int64_t panel, int64_t g, int v) const { return Value(zeros, panel, g, v); }
  V Value(const char* data, int64_t panel, int64_t g, int v) const {
    return Widen(data, op.type, (panel * groups + g) * kPanel + v * kLanes);
  }
};

template <int BITS>
inline void Codes(const uint8_t* at, VI& first, VI& second) {
  const VI bytes = LoadAs<VI>(at);
  if constexpr (BITS == 4) {
    first = bytes & 0x0f0f0f0f;
    second = (bytes >> 4) & 0x0f0f0f0f;
  } else {
    first = bytes;
    second = LoadAs<VI>(at + 64);
  }
}

inline void Finish(const Matrix& m, const Memory& memory, int64_t row, int64_t panel, V* y) {
  for (int v = 0; v < 2; ++v) {
    const int64_t n = panel * kPanel + v * kLanes, count = std::min(kLanes, m.op.outer - n);
    if (count <= 0) return;
    if (m.bias) y[v] += LoadSome(m.bias + n, count);
    float* to = memory.Row(m.op.y, row) + n;
    count == kLanes ? Store(to, y[v]) : StoreSome(to, y[v], count);
  }
}

// The codes of one piece of `count` places times R rows: sums of each row, half of the panel, and digit.
template <int R, int D, int BITS>
inline void Piece(const uint8_t* codes, const char* x, int64_t block, int64_t wide, int64_t count,
                  VI (&sums)[R][2][D]) {
  constexpr int64_t bytes = BITS == 4 ? 64 : 128;
  for (int64_t i = 0; i < count; i += 4, codes += bytes) {
    VI first, second;
    Codes<BITS>(codes, first, second);
    Ask(codes, BITS == 4 ? 8192 : 2048);  // as far ahead as was fastest
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int d = 0; d < D; ++d) {
        const auto quad = LoadAs<int32_t>(x + r * block + d * wide + i);
        sums[r][0][d] = Dot(sums[r][0][d], first, quad);
        sums[r][1][d] = Dot(sums[r][1][d], second, quad);
      }
    }
  }
}

constexpr int64_t kUsual = 32;  // places of a piece whose loop is unrolled

// R rows from `row` times the columns of one panel; D digits, scales of TYPE.
template <int R, int D, int BITS, int64_t TYPE>
void Block(const Matrix& m, const Memory& memory, int64_t row, int64_t panel) {
  const int64_t inner = m.op.inner, piece = m.op.piece, group = m.op.group, block = m.op.block;
  const char* x = memory.At<char>(m.op.quantized) + row * block;
  const Digits first = RowDigits(const_cast<char*>(x), inner, piece, D);
  const int64_t wide = first.digit[1] - first.digit[0];
  const char *size = reinterpret_cast<const char*>(first.scale), *total = reinterpret_cast<const char*>(first.sum);
  const uint8_t* codes = m.codes + panel * m.panel_bytes;
  V y[R][2] = {};
  int64_t at = panel * m.groups * kPanel;  // of scales and zeros
  for (int64_t k = 0, left = group; k < inner; k += piece, x += piece, size += 4, total += 4) {
    VI sums[R][2][D];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const VI offset = (VI{} - LoadAs<int32_t>(total + r * block)) << (BITS == 4 ? 3 : 7);
      for (int v = 0; v < 2; ++v) {
        sums[r][v][0] = VI{};
        sums[r][v][D - 1] = offset;
      }
    }
    const int64_t count = std::min(inner - k, piece);
    if (count == kUsual) {
      Piece<R, D, BITS>(codes, x, block, wide, kUsual, sums);
    } else {
      Piece<R, D, BITS>(codes, x, block, wide, count, sums);
    }
    codes += count * (BITS == 4 ? 16 : 32);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const V scale = Widen(m.scales, TYPE, at + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        V value = __builtin_convertvector(D == 2 ? (sums[r][v][0] << 8) + sums[r][v][D - 1] : sums[r][v][0], V);
        const auto sum = static_cast<float>(LoadAs<int32_t>(total + r * block));
        if (m.zeros) value -= Widen(m.zeros, TYPE, at + v * kLanes) * sum;
        y[r][v] += value * (scale * LoadAs<float>(size + r * block));
      }
    }
    if ((left -= piece) <= 0) at += kPanel, left = group;
  }
  for (int r = 0; r < R; ++r) Finish(m, memory, row + r, panel, y[r]);
}

// The same for one row, in floats.
inline void FloatBlock(const Matrix& m, const Memory& memory, int64_t row, int64_t panel) {
  const float* x = memory.Row(m.op.x, row);
  V y[2] = {};
  for (int64_t k = 0; k < m.op.inner; ++k) {
    const bool narrow = m.op.bits <= 4;
    const uint8_t* at = m.codes + panel * m.panel_bytes + k / 4 * (narrow ? 64 : 128) + k % 4;
    for (int v = 0; v < 2; ++v) {
      const V scale = m.Scale(panel, k / m.op.group, v), zero = m.zeros ? m.Zero(panel, k / m.op.group, v) : V{};
      for (int i = 0; i < kLanes; ++i) {
        const int code = narrow ? (at[4 * i] >> (4 * v) & 15) - 8 : at[4 * i + 64 * v] - 128;
        y[v][i] += x[k] * ((static_cast<float>(code) - zero[i]) * scale[i]);
      }
    }
  }
  Finish(m, memory, row, panel, y);
}

template <int D, int BITS, int64_t TYPE>
void Blocks(const Matrix& m, const Memory& memory, int64_t panel) {
  const int64_t rows = m.op.rows;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    switch (rows - r) {
      case 1: Block<1, D, BITS, TYPE>(m, memory, r, panel); break;
      case 2: Block<2, D, BITS, TYPE>(m, memory, r, panel); break;
      case 3: Block<3, D, BITS, TYPE>(m, memory, r, panel); break;
      default: Block<4, D, BITS, TYPE>(m, memory, r, panel);
    }
  }
}

template <int D, int BITS>
void Rows(const Matrix& m, const Memory& memory, int64_t panel) {
  switch (m.op.type) {
    case kF32: Blocks<D, BITS, kF32>(m, memory, panel); break;
    case kF16: Blocks<D, BITS, kF16>(m, memory, panel); break;
    default: Blocks<D, BITS, kBF16>(m, memory, panel);
  }
  for (int64_t r = 0; r < m.op.rows; ++r) {
    const Digits x = RowDigits(memory.At<char>(m.op.quantized) + r * m.op.block, m.op.inner, m.op.piece, D);
    if (*x.odd) FloatBlock(m, memory, r, panel);
  }
}

// Panels of one task: enough tasks to share evenly, each long enough to stream. M: a matrix in panels.
template <typename M>
int64_t PanelsOfTask(const M& m, int64_t threads) {
  const int64_t even = (m.panels() + 3 * threads - 1) / (3 * threads);
  return std::max<int64_t>(1, std::min(even, (128 << 10) / std::max<int64_t>(1, m.panel_bytes)));
}

template <typename M>
int64_t TasksOf(const M& m, int64_t threads) {
  const int64_t each = PanelsOfTask(m, threads);
  return (m.panels() + each - 1) / each;
}

inline int64_t Tasks(const Linear& op, const Memory& memory, int64_t threads) {
  return TasksOf(Matrix(op, memory), threads);
}

// Tasks are dealt so that each thread reads one stretch of memory while threads keep pace.
inline int64_t Place(int64_t task, int64_t count, int64_t threads) {
  const int64_t part = task % threads, each = count / threads, rest = count % threads;
  return part * each + std::min(part, rest) + task / threads;
}

// `rows` is what is done with one panel, for all rows.
template <typename M>
void RunPanels(const M& m, const Memory& memory, int64_t threads, int64_t task,
               void (*rows)(const M&, const Memory&, int64_t)) {
  task = Place(task, TasksOf(m, threads), threads);
  const int64_t each = PanelsOfTask(m, threads), stop = std::min(m.panels(), (task + 1) * each);
  for (int64_t panel = task * each; panel < stop; ++panel) rows(m, memory, panel);
}

inline void Run(const Linear& op, const Memory& memory, int64_t threads, int64_t task) {
  const auto rows = op.digits == 2 ? (op.bits <= 4 ? Rows<2, 4> : Rows<2, 8>) : (op.bits <= 4 ? Rows<1, 4> : Rows<1, 8>);
  RunPanels(Matrix(op, memory), memory, threads, task, rows);
}

}  // namespace effc
