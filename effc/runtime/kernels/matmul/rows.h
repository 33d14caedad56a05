// Layout nk: a sum a row of codes.

#pragma once

#include "job.h"

namespace {

// y[:,n] of layout nk for any group; `row` has room for K floats.
void AnyOutput(const Job& job, int64_t n, float* row) {
  const uint8_t* codes = job.codes + n * job.stride;
  for (int64_t g = 0; g < job.groups; ++g) {
    const float scale = job.scales[n * job.groups + g];
    const float zero = job.zeros ? job.zeros[n * job.groups + g] : 0.0f;
    for (int64_t k = g * job.group; k < std::min(job.inner, (g + 1) * job.group); ++k) {
      const int code = !job.packed ? static_cast<int8_t>(codes[k]) : k % 2 ? High(codes[k / 2]) : Low(codes[k / 2]);
      row[k] = (static_cast<float>(code) - zero) * scale;
    }
  }
  for (int64_t r = 0; r < job.rows; ++r) {
    const float* x = job.x + r * job.inner;
    float part[16] = {}, rest = 0.0f;
    int64_t k = 0;
    for (; k + 16 <= job.inner; k += 16) {
      for (int i = 0; i < 16; ++i) part[i] += row[k + i] * x[k + i];
    }
    for (; k < job.inner; ++k) rest += row[k] * x[k];
    for (float value : part) rest += value;
    job.y[r * job.outer + n] = rest;
  }
}

#ifdef EFFC_AVX512

// Adds a vector of codes (a byte a lane) at place k of B rows, times R rows of x; only places `there` count.
template <int R, int B, bool packed, bool zeroed>
__attribute__((always_inline)) inline void Step(const uint8_t* codes, int64_t stride, const float* x, int64_t row,
                                                int64_t half, const __m512 (&zeros)[B], __mmask16 there,
                                                __m512 (&sums)[R][B]) {
  const __m512 table = Table();
  for (int b = 0; b < B; ++b) {
    const __m128i bytes = _mm_maskz_loadu_epi8(there, codes + b * stride);
    const __m512i raw = packed ? _mm512_cvtepu8_epi32(bytes) : _mm512_cvtepi8_epi32(bytes);
    __m512 low = packed ? _mm512_permutexvar_ps(raw, table) : _mm512_cvtepi32_ps(raw);
    if constexpr (zeroed) low = _mm512_sub_ps(low, zeros[b]);
    for (int i = 0; i < R; ++i) {
      sums[i][b] = _mm512_fmadd_ps(low, _mm512_maskz_loadu_ps(there, x + i * row), sums[i][b]);
    }
    if constexpr (packed) {
      __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4), table);
      if constexpr (zeroed) high = _mm512_sub_ps(high, zeros[b]);
      for (int i = 0; i < R; ++i) {
        sums[i][b] = _mm512_fmadd_ps(high, _mm512_maskz_loadu_ps(there, x + i * row + half), sums[i][b]);
      }
    }
  }
}

// y[r..r+R, n..n+B] of layout nk where groups are whole vectors.
template <int R, int B, bool packed, bool zeroed>
void Outputs(const Job& job, int64_t r, int64_t n) {
  const int64_t stride = job.stride, half = job.half, groups = job.groups;
  const int64_t per = groups == 1 ? stride : packed ? job.group / 2 : job.group;
  const int64_t row = packed ? 2 * half : job.inner;
  const float* x = (packed ? job.halves.data() : job.x) + r * row;
  const uint8_t* codes = job.codes + n * stride;
  __m512 totals[R][B];
  for (int i = 0; i < R; ++i) {
    for (int b = 0; b < B; ++b) totals[i][b] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512 sums[R][B], zeros[B];
    for (int b = 0; b < B; ++b) {
      for (int i = 0; i < R; ++i) sums[i][b] = _mm512_setzero_ps();
      zeros[b] = zeroed ? _mm512_set1_ps(job.zeros[(n + b) * groups + g]) : _mm512_setzero_ps();
    }
    int64_t k = g * per;
    const int64_t end = std::min(stride, k + per);
    for (; k + 16 <= end; k += 16) {
      Step<R, B, packed, zeroed>(codes + k, stride, x + k, row, half, zeros, 0xffff, sums);
    }
    if (k < end) {
      const __mmask16 there = (1u << (end - k)) - 1;
      Step<R, B, packed, zeroed>(codes + k, stride, x + k, row, half, zeros, there, sums);
    }
    for (int b = 0; b < B; ++b) {
      const __m512 scale = _mm512_set1_ps(job.scales[(n + b) * groups + g]);
      for (int i = 0; i < R; ++i) totals[i][b] = _mm512_fmadd_ps(sums[i][b], scale, totals[i][b]);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int b = 0; b < B; ++b) job.y[(r + i) * job.outer + n + b] = _mm512_reduce_add_ps(totals[i][b]);
  }
}

template <int B, bool packed, bool zeroed>
void AllRows(const Job& job, int64_t n) {
  for (int64_t r = 0; r < job.rows; r += 4) {
    switch (job.rows - r) {
      case 1: Outputs<1, B, packed, zeroed>(job, r, n); break;
      case 2: Outputs<2, B, packed, zeroed>(job, r, n); break;
      case 3: Outputs<3, B, packed, zeroed>(job, r, n); break;
      default: Outputs<4, B, packed, zeroed>(job, r, n);
    }
  }
}

template <bool packed, bool zeroed>
void WideOutputs(const Job& job, int64_t n, int64_t end) {
  for (; n + 4 <= end; n += 4) AllRows<4, packed, zeroed>(job, n);
  for (; n < end; ++n) AllRows<1, packed, zeroed>(job, n);
}

#endif  // EFFC_AVX512

void Rows(const Job& job, int64_t start, int64_t end) {
#ifdef EFFC_AVX512
  if (job.groups == 1 || job.group % (job.packed ? 32 : 16) == 0) {
    const auto wide = job.packed ? (job.zeros ? WideOutputs<true, true> : WideOutputs<true, false>)
                                 : (job.zeros ? WideOutputs<false, true> : WideOutputs<false, false>);
    return wide(job, start, end);
  }
#endif
  std::vector<float> row(job.inner);
  for (int64_t n = start; n < end; ++n) AnyOutput(job, n, row.data());
}

// Even and odd places of x apart, zeros up to a whole vector.
void SplitInput(Job& job) {
  job.half = (job.inner + 1) / 2;
  const int64_t room = (job.half + 15) / 16 * 16;
  job.halves.assign(2 * job.rows * room, 0.0f);
  for (int64_t r = 0; r < job.rows; ++r) {
    float* to = job.halves.data() + 2 * r * room;
    for (int64_t k = 0; k < job.inner; ++k) to[k % 2 * room + k / 2] = job.x[r * job.inner + k];
  }
  job.half = room;
}

}  // namespace
