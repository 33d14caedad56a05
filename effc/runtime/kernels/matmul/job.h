// One product: what goes in, what comes out, and how codes and scales are stored.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(EFFC_PORTABLE)
#define EFFC_AVX512 1
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kPiece = 32;         // rows of codes at a time: they and their columns' sums stay in L1
constexpr int64_t kUnit = 64;          // columns that one thread takes at least

// Scales or zero points as stored.
struct Values {
  const void* data = nullptr;
  ffi::DataType type = ffi::F32;

  explicit operator bool() const { return data != nullptr; }

  float operator[](int64_t i) const {
    if (type == ffi::F32) return static_cast<const float*>(data)[i];
    const uint32_t bits = static_cast<const uint16_t*>(data)[i];
    return type == ffi::BF16 ? From(bits << 16) : Half(bits);
  }

  static float From(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  static float Half(uint32_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return From(sign | 0x7f800000u | fraction << 13);
    if (exponent) return From(sign | (exponent + 112) << 23 | fraction << 13);
    const float tiny = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -tiny : tiny;
  }
};

struct Job {
  const float* x;
  const uint8_t* codes;
  Values scales, zeros;
  float* y;
  int64_t rows, inner, outer;     // R, K, N
  int64_t group, groups, stride;  // stride: bytes of a row of codes
  bool packed;
  std::vector<float> halves;  // nk, packed: of each row of x the even places, then the odd, zero-padded
  int64_t half = 0;           // floats in each of these
};

inline int Low(uint8_t byte) { return static_cast<int8_t>(byte << 4) >> 4; }
inline int High(uint8_t byte) { return static_cast<int8_t>(byte) >> 4; }

#ifdef EFFC_AVX512

struct Pair {
  __m512 a, b;
};

// All f32 values of a four-bit code; vpermps looks at the low four bits of each lane alone.
inline __m512 Table() {
  return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
}

// f32 of 32 packed codes (a: even places, b: odd), or of 32 bytes in order.
template <bool packed>
inline Pair Codes(const uint8_t* at, __m512 table) {
  if constexpr (packed) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return {_mm512_permutexvar_ps(both, table), _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table)};
  } else {
    const auto wide = [](const uint8_t* from) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    };
    return {wide(at), wide(at + 16)};
  }
}

inline __m512 Sixteen(const Values& values, int64_t i) {
  if (values.type == ffi::F32) return _mm512_loadu_ps(static_cast<const float*>(values.data) + i);
  const auto* at = static_cast<const uint16_t*>(values.data) + i;
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  if (values.type == ffi::F16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Even and odd places of 32 values, as codes are unpacked.
inline Pair Split(Pair p) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(p.a, even, p.b), _mm512_permutex2var_ps(p.a, odd, p.b)};
}

inline Pair Join(Pair p) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(p.a, first, p.b), _mm512_permutex2var_ps(p.a, second, p.b)};
}

#endif

}  // namespace
