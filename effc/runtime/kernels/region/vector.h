// Sixteen floats at a time, in the compiler's vector types: AVX-512, AVX2, NEON or plain code, as compiled.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if (defined(__AVX2__) || defined(__AVX512F__)) && !defined(EFFC_PORTABLE)
#define EFFC_X86 1
#include <immintrin.h>
#ifdef __AVX512F__
#define EFFC_AVX512 1
#endif
#endif

namespace effc {

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef uint8_t VB __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;

template <typename T>
inline T LoadAs(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

inline V Load(const float* at) { return LoadAs<V>(at); }
inline void Store(float* at, V value) { std::memcpy(at, &value, sizeof value); }
inline V Fill(float x) { return x - V{}; }
inline VI Bits(V x) { return LoadAs<VI>(&x); }
inline V Floats(VI x) { return LoadAs<V>(&x); }

// The first `count` lanes; the others are 0.
inline V LoadSome(const float* at, int64_t count) {
#ifdef EFFC_AVX512
  return reinterpret_cast<V>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), at));
#endif
  float all[kLanes] = {};
  std::memcpy(all, at, count * sizeof(float));
  return Load(all);
}

inline void StoreSome(float* at, V value, int64_t count) {
#ifdef EFFC_AVX512
  return _mm512_mask_storeu_ps(at, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(value));
#endif
  std::memcpy(at, &value, count * sizeof(float));
}

inline float Sum(V x) {
  float total = 0;
#ifdef EFFC_AVX512
  total = _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  for (int i = 0; i < kLanes; ++i) total += x[i];
#endif
  return total;
}

// The sums of four vectors.
inline void SumFour(const V* x, float* to) {
  const VI even = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}, odd = even + 1;
  const VI low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}, high = low + 2;
  const V first = __builtin_shuffle(x[0], x[1], even) + __builtin_shuffle(x[0], x[1], odd);
  const V second = __builtin_shuffle(x[2], x[3], even) + __builtin_shuffle(x[2], x[3], odd);
  const V all = __builtin_shuffle(first, second, low) + __builtin_shuffle(first, second, high);
  const VI eight = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
  const VI four = {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11};
  const V halves = all + __builtin_shuffle(all, eight), whole = halves + __builtin_shuffle(halves, four);
  std::memcpy(to, &whole, 4 * sizeof(float));
}

inline V Places() { return V{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

inline V Max(V a, V b) { return a > b ? a : b; }
inline V Min(V a, V b) { return a < b ? a : b; }

inline int32_t Highest(VI x) {
#ifdef EFFC_AVX512
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(x));
#else
  int32_t most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

inline float Largest(V x) {
#ifdef EFFC_AVX512
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#else
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}

// e^x to 2 units in the last place; 0 below the normal numbers.
inline V Exp(V x) {
  const V low = Fill(-87.33f), high = Fill(88.72f), magic = Fill(12582912.0f);
  const V inside = Max(Min(x, high), low);
  const V turns = (inside * 1.44269504f + magic) - magic;
  const V r = inside - turns * 0.693359375f + turns * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#ifdef EFFC_AVX512
  const V y = reinterpret_cast<V>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(turns)));
#else
  // In two factors: 2^128 is no float.
  const VI n = __builtin_convertvector(turns, VI), half = n >> 1;
  const V y = p * Floats((half + 127) << 23) * Floats((n - half + 127) << 23);
#endif
  const V cut = x > high ? Fill(std::numeric_limits<float>::infinity()) : x < low ? V{} : y;
  return x != x ? x : cut;
}

inline V Logistic(V x) { return 1.0f / (1.0f + Exp(-x)); }

// Small arguments by their series: the quotient loses their digits.
inline V Tanh(V x) {
  const V square = x * x;
  const V small = x * (1.0f + square * (-0.333333333f + square * (0.133333333f - square * 0.0539682540f)));
  const V large = 1.0f - 2.0f / (Exp(2.0f * x) + 1.0f);
  return square < 0.04f ? small : large;
}

// acc + products of four unsigned bytes a lane with the four signed bytes in `quad`.
inline VI Dot(VI acc, VI bytes, int32_t quad) {
#if defined(EFFC_AVX512) && defined(__AVX512VNNI__)
  return reinterpret_cast<VI>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(bytes),
                                                  _mm512_set1_epi32(quad)));
#elif defined(EFFC_X86)
  const __m256i x = _mm256_set1_epi32(quad), low = _mm256_set1_epi32(0x00ff00ff);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd = _mm256_srai_epi16(x, 8);
  __m256i halves[2], sums[2];
  std::memcpy(halves, &bytes, sizeof bytes);
  std::memcpy(sums, &acc, sizeof acc);
  for (int i = 0; i < 2; ++i) {
    const __m256i a = _mm256_madd_epi16(_mm256_and_si256(halves[i], low), even);
    const __m256i b = _mm256_madd_epi16(_mm256_srli_epi16(halves[i], 8), odd);
    sums[i] = _mm256_add_epi32(sums[i], _mm256_add_epi32(a, b));
  }
  return LoadAs<VI>(sums);
#else
  for (int i = 0; i < 4; ++i) {
    const VI weights = (bytes >> (8 * i)) & 0xff;
    acc += weights * static_cast<int32_t>(static_cast<int8_t>(quad >> (8 * i)));
  }
  return acc;
#endif
}

// Scales and zero points as stored.
enum Type : int64_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

inline V Widen(const void* data, int64_t type, int64_t at) {
  if (type == kF32) return Load(static_cast<const float*>(data) + at);
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const Halves raw = LoadAs<Halves>(static_cast<const uint16_t*>(data) + at);
#ifdef EFFC_AVX512
  if (type == kF16) return reinterpret_cast<V>(_mm512_cvtph_ps(LoadAs<__m256i>(&raw)));
#endif
  const VI bits = __builtin_convertvector(raw, VI);
  if (type == kBF16) return Floats(bits << 16);
  // Half precision. Subnormal numbers by way of integers: XLA's threads take subnormal floats for zero.
  const VI digits = bits & 0x3ff, exponent = bits & 0x7c00;
  const V value = exponent == 0 ? __builtin_convertvector(digits, V) * 0x1p-24f : Floats(((bits & 0x7fff) << 13) + (112 << 23));
  const V full = exponent == 0x7c00 ? Floats((digits << 13) | 0x7f800000) : value;
  return Floats(Bits(full) | ((bits & 0x8000) << 16));
}

// One number as stored.
inline float WidenOne(const void* data, int64_t type, int64_t at) {
  if (type == kF32) return static_cast<const float*>(data)[at];
  uint16_t halves[kLanes] = {static_cast<const uint16_t*>(data)[at]};
  return Widen(halves, type, 0)[0];
}

// Asks for memory that is read soon, `by` bytes from `base` on. A hint may point past the end: it never faults.
// CLOSE: how near it is wanted, 3 in the nearest cache, 2 in the next.
template <int CLOSE = 3>
inline void Ask(const void* base, int64_t by, int64_t bytes = 64) {
  const auto from = reinterpret_cast<uintptr_t>(base) + by;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + i), 0, CLOSE);
}

}  // namespace effc
