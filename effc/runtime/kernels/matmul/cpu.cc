// y[R,N] f32 = x[R,K] f32 times a quantized matrix, for few rows: codes are widened in registers.
//
// Layout kn: codes [K,N], scales [ceil(K/group),N]; layout nk: codes [N,K], scales [N,ceil(K/group)].
// Up to 4 bits two codes share a byte along the last axis, low half first, each two's complement.
// A weight is (code - zero) * scale; sums over a group (or a piece of one) are f32 and scaled once.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
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
constexpr int64_t kAlone = 48 * 1024;  // bytes of codes times rows below which waking a thread costs more
constexpr int64_t kLarge = 4 << 20;    // bytes of codes worth cutting finely, so that no thread waits long

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

// Pieces of a job that threads take one after another. A thread that comes late finds none left and
// touches no buffer, so the caller waits only for pieces under way and cannot wait for a busy pool.
struct Shared {
  Job job;
  bool kn;
  int64_t count, size;  // pieces, and units of kUnit outputs in each
  std::atomic<int64_t> next{0}, done{0};

  void Work() {
    for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) {
      const int64_t start = i * size * kUnit, end = std::min(job.outer, start + size * kUnit);
      kn ? Columns(job, start, end) : Rows(job, start, end);
    }
  }

  void Wait() const {
    for (int turn = 0; done.load(std::memory_order_acquire) < count; ++turn) {
      if (turn > 4096) std::this_thread::yield();
    }
  }
};

void Run(Job job, bool kn, ffi::ThreadPool& pool) {
  const int64_t units = (job.outer + kUnit - 1) / kUnit;
  const int64_t bytes = job.stride * (kn ? job.inner : job.outer), threads = pool.num_threads();
  auto shared = std::make_shared<Shared>();
  shared->kn = kn;
  int64_t count = bytes * job.rows < kAlone ? 1 : threads * (bytes > kLarge ? 8 : 1);
  count = std::max<int64_t>(1, std::min(units, count));
  shared->size = (units + count - 1) / count;
  shared->count = (units + shared->size - 1) / shared->size;
  if (!kn && job.packed) SplitInput(job);
  shared->job = std::move(job);
  for (int64_t i = 1; i < std::min(threads, shared->count); ++i) {
    pool.Schedule([shared] { shared->Work(); });
  }
  shared->Work();
  shared->Wait();
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                  ffi::RemainingArgs rest, int64_t bits, int64_t group, bool kn, ffi::ResultBuffer<ffi::F32> y) {
  Job job{};
  job.x = x.typed_data();
  job.codes = static_cast<const uint8_t*>(codes.untyped_data());
  job.y = y->typed_data();
  job.rows = x.dimensions()[0];
  job.inner = x.dimensions()[1];
  job.outer = y->dimensions()[1];
  job.stride = codes.dimensions()[1];
  job.packed = bits <= 4;
  job.group = group;
  job.groups = (job.inner + group - 1) / group;
  job.scales = {scales.untyped_data(), scales.element_type()};
  if (rest.size()) {
    const auto zeros = rest.get<ffi::AnyBuffer>(0);
    if (!zeros) return zeros.error();
    job.zeros = {zeros->untyped_data(), zeros->element_type()};
  }
  Run(std::move(job), kn, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffcMatmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("kn")
                                  .Ret<ffi::Buffer<ffi::F32>>());
