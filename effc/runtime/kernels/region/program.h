// The words of a native region as structures; effc/runtime/kernels/region/program.py writes them.
//
// A program is a header and its stages; a stage is a header and its ops. Ops of a row stage act on each
// row by itself, one after the other; ops of the other stages are independent of each other. A stage with a
// flag runs only where that flag, which an earlier Decide has set, is as wanted: so branches are skipped.

#pragma once

#include <vector>

#include "vector.h"

namespace effc {

enum Code : int64_t {
  kNorm = 1, kQuantize, kRope, kAppend, kMap, kArgmax, kLinear, kAttention, kDecide, kSure, kSelect, kDense, kJoin,
  kProduct, kCount, kEmbed, kTurns
};

// Where an array lies: base -1 the scratch memory, -2 nowhere, else the number of a buffer.
struct Ref {
  int64_t base, offset;
};

// Rows of floats; stride in floats.
struct View {
  Ref at;
  int64_t stride;
};

struct Header {
  int64_t key, words, stages, scratch, flags;  // key: of all that follows it
};

struct Stage {
  int64_t words, rows, ops;  // rows 0: not by rows
  int64_t flag, wanted;      // flag -1: always
};

struct Op {
  int64_t code, words;
};

struct Norm : Op {
  View x, y;
  Ref scale, bias;
  int64_t heads, width, layer, eps, offset;  // eps, offset: bits of a double
};

// Rows as integers: see quantize.h.
struct Quantize : Op {
  View x;
  Ref to;
  int64_t block, width, piece, digits;
};

struct Rope : Op {
  View x, y;
  Ref cos, sin;
  int64_t heads, width, half, interleaved;
};

struct Append : Op {
  View x;
  Ref cache, lengths;
  int64_t tokens, heads, width, capacity, kind;  // kind: see rows.h
};

// y = f(a, b); an operand's step is 0 where it is one number, which `number` is where it lies nowhere.
struct Map : Op {
  View y, a, b;
  int64_t function, width, a_step, b_step, number;  // number: bits of a double
};

struct Argmax : Op {
  View x;
  Ref y;
  int64_t width;
};

struct Linear : Op {
  View x, y;
  Ref quantized, codes, scales, zeros, bias;
  int64_t block, rows, inner, outer, bits, group, piece, digits, type;
};

// What there is of keys, and how many of the last a token sees (0: all).
struct Seen {
  int64_t capacity, window;
};

// To y, or where there are spans (the most that a token sees) to `parts`, for Join.
struct Attention : Op {
  View q, y;
  Ref keys, values, positions, sinks, parts;
  int64_t batch, tokens, heads, groups, width, value_width, kind, value_kind, spans;
  Seen seen;
  int64_t scale, softcap;  // bits of doubles
};

struct Join : Op {
  View y;
  Ref parts, positions, sinks;
  int64_t heads, width, spans;
  Seen seen;
};

// Sets a flag: whether the first number of every row is other than 0.
struct Decide : Op {
  View x;
  int64_t rows, flag;
};

// y = the probability of the largest of x, less that of the next where margin is set.
struct Sure : Op {
  View x, y;
  int64_t width, margin;
};

// y = x times w [inner, outer] as it lies, of few columns.
struct Dense : Op {
  View x, y;
  Ref w, bias;
  int64_t inner, outer;
};

// y = x times w as it lies, [inner, outer] or [outer, inner] (nk), of floats, f16 or bf16 (see Type).
struct Product : Op {
  View x, y;
  Ref w, bias;
  int64_t rows, inner, outer, nk, type;
};

// y = the row of a where its number in `where` is other than 0, else that of b.
struct Select : Op {
  View y, where, a, b;
  int64_t width;
};

// y = the row of a table whose number is in `ids`: floats as they lie (see Type), or packed codes with scales of a type.
struct Embed : Op {
  View y;
  Ref ids, table, scales, zeros;
  int64_t vocab, width, bits, group, type;  // bits 0: floats
};

// y = the cosines (or sines) of a row's position times each of freq, times scale.
struct Turns : Op {
  View y;
  Ref positions, freq;
  int64_t width, sine, scale;  // scale: bits of a double
};

// y[i] = x + start + i for the x of each row: whole numbers.
struct Count : Op {
  Ref x, y;
  int64_t start, count;
};

inline double Number(int64_t bits) { return LoadAs<double>(&bits); }

// Buffers of one call.
struct Memory {
  char* scratch = nullptr;
  std::vector<char*> buffers;

  template <typename T>
  T* At(Ref ref) const {
    if (ref.base == -2) return nullptr;
    return reinterpret_cast<T*>((ref.base == -1 ? scratch : buffers[ref.base]) + ref.offset);
  }

  float* Row(const View& view, int64_t row) const { return At<float>(view.at) + row * view.stride; }
};

}  // namespace effc
