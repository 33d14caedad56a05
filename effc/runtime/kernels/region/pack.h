// Codes as effc.runtime.qarray stores them, to the panels that linear.h reads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace effc {

// Codes of a matrix [K,N] (kn) or [N,K], K of them summed over.
struct Stored {
  const uint8_t* codes;
  int64_t inner, outer, bits, kn;

  int At(int64_t k, int64_t n) const {
    const int64_t row = kn ? k : n, place = kn ? n : k, width = kn ? outer : inner;
    if (bits > 4) return static_cast<int8_t>(codes[row * width + place]);
    const uint8_t byte = codes[row * ((width + 1) / 2) + place / 2];
    return static_cast<int8_t>(place % 2 ? byte & 0xf0 : byte << 4) >> 4;
  }
};

// Four places of 32 columns, one code after another.
struct Tile {
  uint8_t codes[4][32];
};

inline void Unpack(const uint8_t* from, int64_t bytes, uint8_t* to) {
  for (int64_t j = 0; j < bytes; ++j) {
    to[2 * j] = (from[j] & 15) ^ 8;
    to[2 * j + 1] = from[j] >> 4 ^ 8;
  }
}

inline Tile Read(const Stored& from, int64_t k, int64_t n) {
  Tile tile;
  const bool narrow = from.bits <= 4, whole = n + 32 <= from.outer;
  for (int64_t i = 0; i < 4; ++i) {
    if (from.kn && whole && narrow && from.outer % 2 == 0) {
      Unpack(from.codes + (k + i) * (from.outer / 2) + n / 2, 16, tile.codes[i]);
    } else if (from.kn && whole && !narrow) {
      for (int64_t j = 0; j < 32; ++j) tile.codes[i][j] = from.codes[(k + i) * from.outer + n + j] ^ 128;
    } else {
      for (int64_t j = 0; j < 32; ++j) {
        const int code = n + j < from.outer ? from.At(k + i, n + j) : 0;
        tile.codes[i][j] = static_cast<uint8_t>(code + (narrow ? 8 : 128));
      }
    }
  }
  return tile;
}

inline void Write(const Tile& tile, bool narrow, uint8_t* to) {
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 16; ++j) {
      const uint8_t first = tile.codes[i][j], second = tile.codes[i][j + 16];
      to[4 * j + i] = narrow ? static_cast<uint8_t>(first | second << 4) : first;
      if (!narrow) to[64 + 4 * j + i] = second;
    }
  }
}

inline void PackCodes(const Stored& from, uint8_t* to) {
  const bool narrow = from.bits <= 4;
  for (int64_t n = 0; n < from.outer; n += 32) {
    for (int64_t k = 0; k < from.inner; k += 4, to += narrow ? 64 : 128) Write(Read(from, k, n), narrow, to);
  }
}

// Scales [G,N] (kn) or [N,G] of `size` bytes each to [panels,G,32]; columns past the end are 0.
inline void PackScales(const uint8_t* from, int64_t groups, int64_t outer, int64_t size, bool kn, uint8_t* to) {
  const int64_t panels = (outer + 31) / 32;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t j = 0; j < 32; ++j, to += size) {
        const int64_t n = panel * 32 + j, at = kn ? g * outer + n : n * groups + g;
        n < outer ? std::memcpy(to, from + at * size, size) : std::memset(to, 0, size);
      }
    }
  }
}

}  // namespace effc
