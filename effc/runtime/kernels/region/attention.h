// Attention of new tokens over the rows of a cache: [batch * groups, capacity, m], in place.
//
// A task takes some tokens with all query heads that share a key head, so that rows are read once for these.
// Keys are taken in spans. Few tokens: a task a span, and Join makes one softmax of all spans. Many tokens: a
// task does all spans one after another.

#pragma once

#include <algorithm>
#include <vector>

#include "program.h"
#include "rows.h"

namespace effc {

constexpr int64_t kSpan = 128;   // keys
constexpr int64_t kQueries = 32;  // rows of q that a task of many tokens takes, if heads allow
constexpr int64_t kMany = 28;     // rows of q that make turning keys worth it
constexpr int64_t kEarly = 2048;  // bytes of keys that are asked for early
constexpr int64_t kShared = 6;    // rows of q over one span from which two tasks share them

constexpr float kLeast = -std::numeric_limits<float>::infinity();

// The keys that a token sees: [First, Last).
inline int64_t Last(const Seen& seen, int64_t position) { return std::min(seen.capacity, position + 1); }
inline int64_t First(const Seen& seen, int64_t position) {
  return seen.window ? std::max<int64_t>(0, position + 1 - seen.window) : 0;
}

// Tokens t..stop of one sequence, the query heads of one key head: rows of q, of which a task may have some alone.
struct Queries {
  const Attention& op;
  const Memory& memory;
  int64_t sequence, group, t, stop, skipped = 0;
  const char *keys, *values;
  int64_t share, count, key_bytes, value_bytes;

  Queries(const Attention& op, const Memory& memory, int64_t sequence, int64_t group, int64_t t, int64_t stop)
      : op(op), memory(memory), sequence(sequence), group(group), t(t), stop(stop), share(op.heads / op.groups),
        count((stop - t) * share), key_bytes(RowBytes(op.kind, op.width)),
        value_bytes(RowBytes(op.value_kind, op.value_width)) {
    const int64_t row = (sequence * op.groups + group) * op.seen.capacity;
    keys = memory.At<char>(op.keys) + row * key_bytes;
    values = memory.At<char>(op.values) + row * value_bytes;
  }

  // Rows from..to of these.
  void Take(int64_t from, int64_t to) { skipped = from, count = to - from; }

  int64_t Token(int64_t i) const { return sequence * op.tokens + t + (skipped + i) / share; }
  int64_t HeadOf(int64_t i) const { return group * share + (skipped + i) % share; }
  const float* Query(int64_t i) const { return memory.Row(op.q, Token(i)) + HeadOf(i) * op.width; }
  int64_t Position(int64_t i) const { return memory.At<int32_t>(op.positions)[Token(i)]; }
};

// Keys or values of a span as they are read: where they lie, or widened.
struct Stretch {
  const char* at;
  int64_t bytes, kind;
};

// What a span comes to for each row: the largest score, the sum of powers, their products with values.
struct Softmax {
  float *most, *total, *sums;
  int64_t stride;
};

// Products of R rows of q with J keys.
template <int64_t KIND, int R, int J>
inline void Scores(const Queries& q, int64_t i, const char* key, int64_t bytes, float* to) {
  V sums[R][4] = {};
  const float* from[R];
  for (int r = 0; r < R; ++r) from[r] = q.Query(i + r);
  const int64_t width = q.op.width;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    V row[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) row[j] = Read<KIND>(key + j * bytes, k, width);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V x = Load(from[r] + k);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) sums[r][j] += x * row[j];
    }
  }
  for (; KIND == kWhole && k < width; k = width) {
    for (int r = 0; r < R; ++r) {
      const V x = LoadSome(from[r] + k, width - k);
      for (int j = 0; j < J; ++j) {
        sums[r][j] += x * LoadSome(reinterpret_cast<const float*>(key + j * bytes) + k, width - k);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float four[4];
    SumFour(sums[r], four);
    std::memcpy(to + r * kSpan, four, J * sizeof(float));
  }
}

// Spans end before hardware has seen what comes next: the first rows of q ask for keys, and for the values that follow.
template <int64_t KIND, int R>
void ScoreRows(const Queries& q, int64_t i, const Stretch& keys, const Stretch& values, int64_t first, int64_t last,
               float* scores) {
  int64_t j = first;
  for (; j + 4 <= last; j += 4) {
    if (i == 0) {
      Ask(keys.at, j * keys.bytes + kEarly, 4 * keys.bytes);
      Ask(values.at, j * values.bytes, 4 * values.bytes);
    }
    Scores<KIND, R, 4>(q, i, keys.at + j * keys.bytes, keys.bytes, scores + j);
  }
  for (; j < last; ++j) Scores<KIND, R, 1>(q, i, keys.at + j * keys.bytes, keys.bytes, scores + j);
}

// Rows of q that are taken at once, 4 at most: as many each time.
inline int64_t AtOnce(int64_t count) {
  const int64_t times = (count + 3) / 4;
  return (count + times - 1) / times;
}

template <int64_t KIND>
void ScoreAll(const Queries& q, const Stretch& keys, const Stretch& values, int64_t first, int64_t last,
              float* scores) {
  const int64_t each = AtOnce(q.count);
  for (int64_t i = 0; i < q.count; i += each) {
    float* to = scores + i * kSpan;
    switch (std::min(each, q.count - i)) {
      case 1: ScoreRows<KIND, 1>(q, i, keys, values, first, last, to); break;
      case 2: ScoreRows<KIND, 2>(q, i, keys, values, first, last, to); break;
      case 3: ScoreRows<KIND, 3>(q, i, keys, values, first, last, to); break;
      default: ScoreRows<KIND, 4>(q, i, keys, values, first, last, to);
    }
  }
}

// Sixteen keys, one a lane: turned[width][16].
inline void Turn(const float* keys, int64_t width, int64_t count, float* turned) {
  for (int64_t j = 0; j < kLanes; ++j) {
    for (int64_t i = 0; i < width; ++i) turned[i * kLanes + j] = j < count ? keys[j * width + i] : 0.0f;
  }
}

template <int R>
void ScoreTurned(const Queries& q, int64_t i, const float* turned, float* to) {
  V sums[R] = {};
  const float* from[R];
  for (int r = 0; r < R; ++r) from[r] = q.Query(i + r);
  for (int64_t k = 0; k < q.op.width; ++k) {
    const V key = Load(turned + k * kLanes);
    for (int r = 0; r < R; ++r) sums[r] += key * from[r][k];
  }
  for (int r = 0; r < R; ++r) Store(to + r * kSpan, sums[r]);
}

// Each key turned once for all rows.
inline void ScoreTogether(const Queries& q, const float* keys, int64_t first, int64_t last, float* scores,
                          float* turned) {
  for (int64_t j = first / kLanes * kLanes; j < last; j += kLanes) {
    Turn(keys + j * q.op.width, q.op.width, std::min(kLanes, last - j), turned);
    int64_t i = 0;
    for (; i + 4 <= q.count; i += 4) ScoreTurned<4>(q, i, turned, scores + i * kSpan + j);
    for (; i < q.count; ++i) ScoreTurned<1>(q, i, turned, scores + i * kSpan + j);
  }
}

// One row's scores first..last to powers of what they are less than the largest, times the scales of values; what is
// outside weighs 0. Of the `places` of a span, rounded up to whole vectors.
inline void Powers(const Attention& op, float* scores, const float* key_scales, const float* value_scales,
                   int64_t places, int64_t first, int64_t last, float* most, float* total) {
  const auto scale = static_cast<float>(Number(op.scale)), cap = static_cast<float>(Number(op.softcap));
  const V at = Places(), from = Fill(static_cast<float>(first)), to = Fill(static_cast<float>(last));
  V largest = Fill(kLeast), sum = {};
  for (int64_t j = 0; j < places; j += kLanes) {
    V x = Load(scores + j) * scale;
    if (key_scales) x *= Load(key_scales + j);
    if (cap != 0.0f) x = cap * Tanh(x / cap);
    const V place = at + static_cast<float>(j);
    x = (place >= from) & (place < to) ? x : Fill(kLeast);
    Store(scores + j, x);
    largest = Max(x, largest);
  }
  *most = Largest(largest);
  const float less = *most == kLeast ? 0.0f : *most;
  for (int64_t j = 0; j < places; j += kLanes) {
    V x = Exp(Load(scores + j) - less);
    sum += x;
    if (value_scales) x *= Load(value_scales + j);
    Store(scores + j, x);
  }
  *total = Sum(sum);
}

// C vectors from place `at` of R rows: += weights times values.
template <int64_t KIND, int R, int C>
void Mix(const Stretch& values, int64_t width, int64_t at, const float* weights, int64_t first, int64_t last,
         float* sums, int64_t stride) {
  V all[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) all[r][c] = Load(sums + r * stride + at + c * kLanes);
  }
  for (int64_t j = first; j < last; ++j) {
    const char* row = values.at + j * values.bytes;
    V value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = Read<KIND>(row, at + c * kLanes, width);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) all[r][c] += value[c] * weights[r * kSpan + j];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) Store(sums + r * stride + at + c * kLanes, all[r][c]);
  }
}

template <int64_t KIND, int R>
void MixRows(const Stretch& values, int64_t width, const float* weights, int64_t first, int64_t last, float* sums,
             int64_t stride) {
  int64_t at = 0;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes) {
    Mix<KIND, R, 4>(values, width, at, weights, first, last, sums, stride);
  }
  for (; at + kLanes <= width; at += kLanes) {
    Mix<KIND, R, 1>(values, width, at, weights, first, last, sums, stride);
  }
  for (; KIND == kWhole && at < width; ++at) {
    for (int r = 0; r < R; ++r) {
      for (int64_t j = first; j < last; ++j) {
        const auto* value = reinterpret_cast<const float*>(values.at + j * values.bytes);
        sums[r * stride + at] += weights[r * kSpan + j] * value[at];
      }
    }
  }
}

template <int64_t KIND>
void MixAll(const Queries& q, const Stretch& values, const float* weights, int64_t first, int64_t last,
            const Softmax& to) {
  const int64_t width = q.op.value_width, each = AtOnce(q.count);
  for (int64_t i = 0; i < q.count; i += each) {
    float* sums = to.sums + i * to.stride;
    const float* from = weights + i * kSpan;
    switch (std::min(each, q.count - i)) {
      case 1: MixRows<KIND, 1>(values, width, from, first, last, sums, to.stride); break;
      case 2: MixRows<KIND, 2>(values, width, from, first, last, sums, to.stride); break;
      case 3: MixRows<KIND, 3>(values, width, from, first, last, sums, to.stride); break;
      default: MixRows<KIND, 4>(values, width, from, first, last, sums, to.stride);
    }
  }
}

// Memory of a task, kept by its thread.
struct Room {
  std::vector<float> scores, turned, keys, values, sums, most, total;
  float key_scales[kSpan], value_scales[kSpan];
};

// Rows of a span in floats where that pays or vectors do not fit, else as they lie.
inline Stretch Stretched(const char* at, int64_t kind, int64_t width, int64_t count, int64_t first, int64_t last,
                         std::vector<float>& wide) {
  if (kind == kWhole || (count < kMany && Even(kind, width))) return {at, RowBytes(kind, width), kind};
  wide.resize(std::max<size_t>(wide.size(), kSpan * width));
  for (int64_t j = first; j < last; ++j) Widened(at + j * RowBytes(kind, width), kind, width, wide.data() + j * width);
  return {reinterpret_cast<const char*>(wide.data()), 4 * width, kWhole};
}

// The scales of a span's rows; none where they are in the rows already.
inline const float* Scales(const char* at, const Stretch& read, int64_t width, int64_t first, int64_t last,
                           float* scales) {
  if (read.kind != kBytes && read.kind != kNibbles) return nullptr;
  std::fill(scales, scales + kSpan, 0.0f);
  for (int64_t j = first; j < last; ++j) scales[j] = RowScale(at + j * read.bytes, read.kind, width);
  return scales;
}

// Keys begin + first..last of the span from `begin` on: `to` has what they come to; `add`: with what it holds.
inline void Span(const Queries& q, int64_t begin, int64_t first, int64_t last, Room& room, const Softmax& to,
                 bool add) {
  const char *keys = q.keys + begin * q.key_bytes, *values = q.values + begin * q.value_bytes;
  const Stretch k = Stretched(keys, q.op.kind, q.op.width, q.count, first, last, room.keys);
  const Stretch v = Stretched(values, q.op.value_kind, q.op.value_width, q.count, first, last, room.values);
  const float* key_scales = Scales(keys, k, q.op.width, first, last, room.key_scales);
  const float* value_scales = Scales(values, v, q.op.value_width, first, last, room.value_scales);
  room.scores.resize(std::max<size_t>(room.scores.size(), q.count * kSpan));
  room.turned.resize(std::max<size_t>(room.turned.size(), q.op.width * kLanes));
  float* scores = room.scores.data();
  if (q.count >= kMany) {
    ScoreTogether(q, reinterpret_cast<const float*>(k.at), first, last, scores, room.turned.data());
  } else {
    switch (k.kind) {
      case kWhole: ScoreAll<kWhole>(q, k, v, first, last, scores); break;
      case kHalf: ScoreAll<kHalf>(q, k, v, first, last, scores); break;
      case kBytes: ScoreAll<kBytes>(q, k, v, first, last, scores); break;
      default: ScoreAll<kNibbles>(q, k, v, first, last, scores);
    }
  }
  for (int64_t i = 0; i < q.count; ++i) {
    const int64_t from = std::max<int64_t>(0, First(q.op.seen, q.Position(i)) - begin);
    const int64_t stop = std::min(kSpan, Last(q.op.seen, q.Position(i)) - begin);
    float most, total, *sums = to.sums + i * to.stride;
    Powers(q.op, scores + i * kSpan, key_scales, value_scales, last, from, stop, &most, &total);
    float old = 0.0f, mine = 1.0f;
    if (add) {
      const float all = std::max(most, to.most[i]), less = all == kLeast ? 0.0f : all;
      old = std::exp(to.most[i] - less), mine = std::exp(most == kLeast ? 0.0f : most - less);
      most = all;
    }
    to.most[i] = most;
    to.total[i] = (add ? to.total[i] * old : 0.0f) + total * mine;
    for (int64_t e = 0; e < q.op.value_width; ++e) sums[e] = add ? sums[e] * old : 0.0f;
    if (mine != 1.0f) {
      for (int64_t j = 0; j < kSpan; ++j) scores[i * kSpan + j] *= mine;
    }
  }
  switch (v.kind) {
    case kWhole: return MixAll<kWhole>(q, v, scores, first, last, to);
    case kHalf: return MixAll<kHalf>(q, v, scores, first, last, to);
    case kBytes: return MixAll<kBytes>(q, v, scores, first, last, to);
    default: return MixAll<kNibbles>(q, v, scores, first, last, to);
  }
}

// The spans that some of `count` tokens from number `token` on see: [first, second).
struct Spans {
  int64_t first, last;

  Spans(const Seen& seen, const int32_t* positions, int64_t count) : first(seen.capacity), last(0) {
    for (int64_t i = 0; i < count; ++i) {
      first = std::min(first, First(seen, positions[i]));
      last = std::max(last, Last(seen, positions[i]));
    }
    first = first / kSpan, last = std::max(first + 1, (last + kSpan - 1) / kSpan);
  }
};

inline int64_t TokensOfTask(const Attention& op) { return std::max<int64_t>(1, kQueries * op.groups / op.heads); }
inline int64_t Blocks(const Attention& op) { return (op.tokens + TokensOfTask(op) - 1) / TokensOfTask(op); }
inline int64_t Floats(const Attention& op) { return op.value_width + 2; }

inline Spans AllSpans(const Attention& op, const Memory& memory) {
  return Spans(op.seen, memory.At<int32_t>(op.positions), op.batch * op.tokens);
}

// Tasks that share the rows of q over one span: key heads are few, and all wait for the thread that has one more.
inline int64_t Sharers(const Attention& op) {
  return op.batch == 1 && op.tokens * op.heads / op.groups >= kShared ? 2 : 1;
}

inline int64_t Tasks(const Attention& op, const Memory& memory) {
  if (!op.spans) return op.batch * op.groups * Blocks(op);
  const Spans all = AllSpans(op, memory);
  return op.batch * op.groups * (all.last - all.first) * Sharers(op);
}

// Where the parts of a token's spans begin; a part is the sums, the largest score, the sum of powers of a head.
inline float* Part(float* parts, int64_t token, int64_t spans, int64_t heads, int64_t floats, int64_t span) {
  return parts + (token * spans + span) * heads * floats;
}

// All tokens of a sequence over one span, to `parts`; or this sharer's part of them.
inline void RunSpan(const Attention& op, const Memory& memory, int64_t task, Room& room) {
  const Spans all = AllSpans(op, memory);
  const int64_t sharers = Sharers(op), sharer = task % sharers, pair = task / sharers;
  const int64_t span = all.first + pair / (op.batch * op.groups), which = pair % (op.batch * op.groups);
  Queries q(op, memory, which / op.groups, which % op.groups, 0, op.tokens);
  const int64_t rows = q.count;
  q.Take(rows * sharer / sharers, rows * (sharer + 1) / sharers);
  room.most.resize(std::max<size_t>(room.most.size(), q.count));
  room.total.resize(std::max<size_t>(room.total.size(), q.count));
  const int64_t stride = (op.value_width + kLanes - 1) / kLanes * kLanes, floats = Floats(op);
  room.sums.resize(std::max<size_t>(room.sums.size(), q.count * stride));
  int64_t first = kSpan, last = 0;
  for (int64_t i = 0; i < q.count; ++i) {
    first = std::min(first, std::max<int64_t>(0, First(op.seen, q.Position(i)) - span * kSpan));
    last = std::max(last, std::min(kSpan, Last(op.seen, q.Position(i)) - span * kSpan));
  }
  const Softmax sums{room.most.data(), room.total.data(), room.sums.data(), stride};
  Span(q, span * kSpan, std::min(first, last), last, room, sums, false);
  for (int64_t i = 0; i < q.count; ++i) {
    float* to = Part(memory.At<float>(op.parts), q.Token(i), op.spans, op.heads, floats, span) + q.HeadOf(i) * floats;
    std::memcpy(to, room.sums.data() + i * stride, op.value_width * sizeof(float));
    to[op.value_width] = room.most[i], to[op.value_width + 1] = room.total[i];
  }
}

inline float Sink(const float* sinks, int64_t head) { return sinks ? sinks[head] : kLeast; }

// sums / total, with one score more of which nothing is read.
inline void Divide(const float* sums, float most, float total, float sink, int64_t width, float* y) {
  const float all = std::max(most, sink), less = all == kLeast ? 0.0f : all;
  const float mine = std::exp(most == kLeast ? 0.0f : most - less);
  const float factor = mine / (total * mine + (sink == kLeast ? 0.0f : std::exp(sink - less)));
  for (int64_t e = 0; e < width; ++e) y[e] = sums[e] * factor;
}

// Some tokens over all that they see, to y.
inline void RunBlock(const Attention& op, const Memory& memory, int64_t task, Room& room) {
  // Late blocks see most keys: they go first, so that none is waited for at the end.
  const int64_t each = TokensOfTask(op), block = Blocks(op) - 1 - task / (op.batch * op.groups);
  const int64_t which = task % (op.batch * op.groups), t = block * each, stop = std::min(op.tokens, t + each);
  const Queries q(op, memory, which / op.groups, which % op.groups, t, stop);
  const int64_t stride = (op.value_width + kLanes - 1) / kLanes * kLanes;
  room.sums.assign(std::max<size_t>(room.sums.size(), q.count * stride), 0.0f);
  room.most.assign(std::max<size_t>(room.most.size(), q.count), kLeast);
  room.total.assign(std::max<size_t>(room.total.size(), q.count), 0.0f);
  const int32_t* positions = memory.At<int32_t>(op.positions) + q.Token(0);
  const Spans spans(op.seen, positions, stop - t);
  int64_t first = op.seen.capacity, last = 0;
  for (int64_t i = 0; i < stop - t; ++i) {
    first = std::min(first, First(op.seen, positions[i]));
    last = std::max(last, Last(op.seen, positions[i]));
  }
  const Softmax to{room.most.data(), room.total.data(), room.sums.data(), stride};
  for (int64_t begin = spans.first * kSpan; begin < last; begin += kSpan) {
    Span(q, begin, std::max<int64_t>(0, first - begin), std::min(kSpan, last - begin), room, to, true);
  }
  for (int64_t i = 0; i < q.count; ++i) {
    const int64_t head = q.HeadOf(i);
    float* y = memory.Row(op.y, q.Token(i)) + head * op.value_width;
    Divide(to.sums + i * stride, to.most[i], to.total[i], Sink(memory.At<float>(op.sinks), head), op.value_width, y);
  }
}

inline void Run(const Attention& op, const Memory& memory, int64_t task) {
  thread_local Room room;
  op.spans ? RunSpan(op, memory, task, room) : RunBlock(op, memory, task, room);
}

// One softmax of a token's spans.
inline void Run(const Join& op, const Memory& memory, int64_t row) {
  const int64_t floats = op.width + 2;
  const Spans spans(op.seen, memory.At<int32_t>(op.positions) + row, 1);
  for (int64_t h = 0; h < op.heads; ++h) {
    const auto part = [&](int64_t span) {
      return Part(memory.At<float>(op.parts), row, op.spans, op.heads, floats, span) + h * floats;
    };
    float most = kLeast, total = 0;
    for (int64_t s = spans.first; s < spans.last; ++s) most = std::max(most, part(s)[op.width]);
    const float less = most == kLeast ? 0.0f : most;
    float* y = memory.Row(op.y, row) + h * op.width;
    std::fill(y, y + op.width, 0.0f);
    for (int64_t s = spans.first; s < spans.last; ++s) {
      const float* from = part(s);
      if (from[op.width] == kLeast && from[op.width + 1] == 0.0f) continue;
      const float mine = std::exp(from[op.width] == kLeast ? 0.0f : from[op.width] - less);
      total += from[op.width + 1] * mine;
      for (int64_t e = 0; e < op.width; ++e) y[e] += from[e] * mine;
    }
    Divide(y, most, total, Sink(memory.At<float>(op.sinks), h), op.width, y);
  }
}

}  // namespace effc
