// Rows of caches as they are kept (effc/runtime/coded.py): f32, f16, or codes of 8 or 4 bits and then their f32 scale.

#pragma once

#include <algorithm>

#include "vector.h"

namespace effc {

enum Kind : int64_t { kWhole, kHalf, kBytes, kNibbles };

inline int64_t RowBytes(int64_t kind, int64_t width) {
  switch (kind) {
    case kWhole: return 4 * width;
    case kHalf: return 2 * width;
    case kBytes: return width + 4;
    default: return width / 2 + 4;
  }
}

// Sixteen numbers of a row from place i on, less their scale. Half of a row of nibbles is whole vectors.
template <int64_t KIND>
inline V Read(const char* row, int64_t i, int64_t width) {
  typedef int8_t Bytes __attribute__((vector_size(16)));
  if constexpr (KIND == kWhole) return Load(reinterpret_cast<const float*>(row) + i);
  if constexpr (KIND == kHalf) return Widen(row, kF16, i);
  if constexpr (KIND == kBytes) return __builtin_convertvector(LoadAs<Bytes>(row + i), V);
  typedef uint8_t Nibbles __attribute__((vector_size(16)));
  const bool high = i >= width / 2;
  const Nibbles both = LoadAs<Nibbles>(row + (high ? i - width / 2 : i));
  const Nibbles codes = high ? both >> 4 : both & 15;
  return __builtin_convertvector(codes, V) - 8.0f;
}

inline float RowScale(const char* row, int64_t kind, int64_t width) {
  return kind == kBytes || kind == kNibbles ? LoadAs<float>(row + RowBytes(kind, width) - 4) : 1.0f;
}

// Whether `Read` takes all of a row in whole vectors.
inline bool Even(int64_t kind, int64_t width) { return width % (kind == kNibbles ? 2 * kLanes : kLanes) == 0; }

inline float One(const char* row, int64_t kind, int64_t width, int64_t i) {
  switch (kind) {
    case kWhole: return WidenOne(row, kF32, i);
    case kHalf: return WidenOne(row, kF16, i);
    case kBytes: return static_cast<float>(static_cast<int8_t>(row[i]));
    default: {
      const auto both = static_cast<uint8_t>(row[i % (width / 2)]);
      return static_cast<float>((i < width / 2 ? both & 15 : both >> 4) - 8);
    }
  }
}

template <int64_t KIND>
void Widened(const char* row, int64_t width, float* to) {
  const float scale = RowScale(row, KIND, width);
  int64_t i = 0;
  for (; Even(KIND, width) && i < width; i += kLanes) Store(to + i, Read<KIND>(row, i, width) * scale);
  for (; i < width; ++i) to[i] = One(row, KIND, width, i) * scale;
}

// The row in floats.
inline void Widened(const char* row, int64_t kind, int64_t width, float* to) {
  switch (kind) {
    case kWhole: return Widened<kWhole>(row, width, to);
    case kHalf: return Widened<kHalf>(row, width, to);
    case kBytes: return Widened<kBytes>(row, width, to);
    default: return Widened<kNibbles>(row, width, to);
  }
}

// Ties to even; what is too large becomes the largest there is, NaN stays.
inline uint16_t Half(float x) {
  const uint32_t bits = LoadAs<uint32_t>(&x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477fe000) return static_cast<uint16_t>(sign | 0x7bff);
  if (size < 0x38800000) {  // subnormal: the addition rounds
    const float shifted = LoadAs<float>(&size) + 0.5f;
    return static_cast<uint16_t>(sign | (LoadAs<uint32_t>(&shifted) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

// As coded.py: the largest lies half a step past the last code.
inline float CodeScale(const float* x, int64_t width, float steps) {
  float most = 0;
  for (int64_t i = 0; i < width; ++i) most = std::fabs(x[i]) > most || x[i] != x[i] ? std::fabs(x[i]) : most;
  return most == 0 ? 1.0f : most / steps;
}

inline int Code(float x, float scale, float most) {
  const float code = std::nearbyint(x / scale);
  return code == code ? static_cast<int>(std::max(-most, std::min(most, code))) : 0;
}

inline void Keep(const float* x, int64_t kind, int64_t width, char* to) {
  if (kind == kWhole) {
    std::memcpy(to, x, width * sizeof(float));
  } else if (kind == kHalf) {
    int64_t i = 0;
#ifdef EFFC_AVX512
    for (; i + kLanes <= width; i += kLanes) {
      const V value = Load(x + i), inside = Min(Max(value, Fill(-65504.0f)), Fill(65504.0f));
      const auto kept = reinterpret_cast<__m512>(value != value ? value : inside);
      const __m256i halves = _mm512_cvtps_ph(kept, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      std::memcpy(to + 2 * i, &halves, sizeof halves);
    }
#endif
    for (; i < width; ++i) {
      const uint16_t half = Half(x[i]);
      std::memcpy(to + 2 * i, &half, sizeof half);
    }
  } else {
    const float scale = CodeScale(x, width, kind == kBytes ? 127.5f : 7.5f);
    const int64_t half = width / 2;
    for (int64_t i = 0; kind == kBytes && i < width; ++i) to[i] = static_cast<char>(Code(x[i], scale, 127));
    for (int64_t i = 0; kind == kNibbles && i < half; ++i) {
      to[i] = static_cast<char>((Code(x[i], scale, 7) + 8) | (Code(x[half + i], scale, 7) + 8) << 4);
    }
    std::memcpy(to + RowBytes(kind, width) - 4, &scale, sizeof scale);
  }
}

}  // namespace effc
