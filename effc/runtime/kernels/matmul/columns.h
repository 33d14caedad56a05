// Layout kn: sums over rows of codes, for panels of columns.

#pragma once

#include "job.h"

namespace {

// Adds rows k0..k1 (of group g) times columns n..n+count; n is even, count at most kUnit.
void AnyColumns(const Job& job, int64_t k0, int64_t k1, int64_t g, int64_t n, int64_t count) {
  const int64_t step = job.packed ? 2 : 1, bytes = (count + step - 1) / step;
  float zero[kUnit] = {}, zero_high[kUnit] = {};
  if (job.zeros) {
    for (int64_t j = 0; j < count; ++j) {
      float* to = job.packed && j % 2 ? zero_high : zero;
      to[j / step] = job.zeros[g * job.outer + n + j];
    }
  }
  for (int64_t r = 0; r < job.rows; ++r) {
    float sums[kUnit] = {}, high[kUnit] = {};
    for (int64_t k = k0; k < k1; ++k) {
      const float x = job.x[r * job.inner + k];
      const uint8_t* codes = job.codes + k * job.stride + n / step;
      if (job.packed) {
        for (int64_t j = 0; j < bytes; ++j) {
          sums[j] += x * (static_cast<float>(Low(codes[j])) - zero[j]);
          high[j] += x * (static_cast<float>(High(codes[j])) - zero_high[j]);
        }
      } else {
        for (int64_t j = 0; j < bytes; ++j) {
          sums[j] += x * (static_cast<float>(static_cast<int8_t>(codes[j])) - zero[j]);
        }
      }
    }
    float* y = job.y + r * job.outer + n;
    for (int64_t j = 0; j < count; ++j) {
      const float* from = job.packed && j % 2 ? high : sums;
      y[j] += from[j / step] * job.scales[g * job.outer + n + j];
    }
  }
}

#ifdef EFFC_AVX512

// R rows from row r, times rows k0..k1 of codes, into C * 32 columns from n.
template <int R, int C, bool packed, bool zeroed>
void Panel(const Job& job, int64_t r, int64_t k0, int64_t k1, int64_t g, int64_t n) {
  constexpr int bytes = packed ? 16 : 32;
  const __m512 table = Table();
  Pair sums[R][C], zeros[C];
  for (int c = 0; c < C; ++c) {
    for (int i = 0; i < R; ++i) sums[i][c] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if constexpr (zeroed) {
      const int64_t at = g * job.outer + n + 32 * c;
      zeros[c] = {Sixteen(job.zeros, at), Sixteen(job.zeros, at + 16)};
      if (packed) zeros[c] = Split(zeros[c]);
    }
  }
  const float* x = job.x + r * job.inner;
  const uint8_t* codes = job.codes + k0 * job.stride + (packed ? n / 2 : n);
  for (int64_t k = k0; k < k1; ++k, codes += job.stride) {
    for (int c = 0; c < C * bytes; c += 64) {
      // A hint may point past the end: it never faults.
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(codes) + kPiece * job.stride + c));
    }
    __m512 row[R];
    for (int i = 0; i < R; ++i) row[i] = _mm512_set1_ps(x[i * job.inner + k]);
    for (int c = 0; c < C; ++c) {
      Pair w = Codes<packed>(codes + c * bytes, table);
      if constexpr (zeroed) w = {_mm512_sub_ps(w.a, zeros[c].a), _mm512_sub_ps(w.b, zeros[c].b)};
      for (int i = 0; i < R; ++i) {
        sums[i][c].a = _mm512_fmadd_ps(row[i], w.a, sums[i][c].a);
        sums[i][c].b = _mm512_fmadd_ps(row[i], w.b, sums[i][c].b);
      }
    }
  }
  for (int c = 0; c < C; ++c) {
    const int64_t at = g * job.outer + n + 32 * c;
    const Pair scale = {Sixteen(job.scales, at), Sixteen(job.scales, at + 16)};
    for (int i = 0; i < R; ++i) {
      const Pair sum = packed ? Join(sums[i][c]) : sums[i][c];
      float* y = job.y + (r + i) * job.outer + n + 32 * c;
      _mm512_storeu_ps(y, _mm512_fmadd_ps(sum.a, scale.a, _mm512_loadu_ps(y)));
      _mm512_storeu_ps(y + 16, _mm512_fmadd_ps(sum.b, scale.b, _mm512_loadu_ps(y + 16)));
    }
  }
}

// All rows times C * 32 columns, four rows at a time; wide panels are cut where registers would not do.
template <int C, bool packed, bool zeroed>
void Panels(const Job& job, int64_t k0, int64_t k1, int64_t g, int64_t n) {
  constexpr int half = C > 1 ? C / 2 : 1;
  for (int64_t r = 0; r < job.rows; r += 4) {
    switch (job.rows - r) {
      case 1: Panel<1, C, packed, zeroed>(job, r, k0, k1, g, n); break;
      case 2: Panel<2, C, packed, zeroed>(job, r, k0, k1, g, n); break;
      case 3:
        for (int c = 0; c < C; c += half) Panel<3, half, packed, zeroed>(job, r, k0, k1, g, n + 32 * c);
        break;
      default:
        for (int c = 0; c < C; c += half) Panel<4, half, packed, zeroed>(job, r, k0, k1, g, n + 32 * c);
    }
  }
}

// Columns done from n on, in panels as wide as fit.
template <bool packed, bool zeroed>
int64_t WideColumns(const Job& job, int64_t k0, int64_t k1, int64_t g, int64_t n, int64_t end) {
  for (; n + 128 <= end; n += 128) Panels<4, packed, zeroed>(job, k0, k1, g, n);
  for (; n + 64 <= end; n += 64) Panels<2, packed, zeroed>(job, k0, k1, g, n);
  for (; n + 32 <= end; n += 32) Panels<1, packed, zeroed>(job, k0, k1, g, n);
  return n;
}

#endif  // EFFC_AVX512

void Columns(const Job& job, int64_t start, int64_t end) {
  for (int64_t r = 0; r < job.rows; ++r) {
    std::fill(job.y + r * job.outer + start, job.y + r * job.outer + end, 0.0f);
  }
  for (int64_t k = 0; k < job.inner;) {
    const int64_t g = k / job.group, stop = std::min({job.inner, (g + 1) * job.group, k + kPiece});
    int64_t n = start;
#ifdef EFFC_AVX512
    const auto wide = job.packed ? (job.zeros ? WideColumns<true, true> : WideColumns<true, false>)
                                 : (job.zeros ? WideColumns<false, true> : WideColumns<false, false>);
    n = wide(job, k, stop, g, n, end);
#endif
    for (; n < end; n += kUnit) AnyColumns(job, k, stop, g, n, std::min(kUnit, end - n));
    k = stop;
  }
}

}  // namespace
