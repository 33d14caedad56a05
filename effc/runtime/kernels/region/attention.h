// Attention of new tokens over the rows of a cache: [batch * groups, capacity, width], in place.

#pragma once

#include <algorithm>
#include <vector>

#include "program.h"

namespace effc {

constexpr int64_t kQueries = 32;  // that one task takes
constexpr int64_t kMany = 12;     // queries that make turning keys worth it

// One head of one sequence.
struct Head {
  const Attention& op;
  const Memory& memory;
  int64_t sequence, head;
  const float *keys, *values;

  Head(const Attention& op, const Memory& memory, int64_t sequence, int64_t head)
      : op(op), memory(memory), sequence(sequence), head(head) {
    const int64_t row = (sequence * op.groups + head / (op.heads / op.groups)) * op.capacity;
    keys = memory.At<float>(op.keys) + row * op.width;
    values = memory.At<float>(op.values) + row * op.value_width;
  }

  const float* Query(int64_t t) const { return memory.Row(op.q, sequence * op.tokens + t) + head * op.width; }
  float* Result(int64_t t) const { return memory.Row(op.y, sequence * op.tokens + t) + head * op.value_width; }
  int64_t Position(int64_t t) const { return memory.At<int32_t>(op.positions)[sequence * op.tokens + t]; }
  // The keys that token t sees: [First, Last).
  int64_t Last(int64_t t) const { return std::min(op.capacity, Position(t) + 1); }
  int64_t First(int64_t t) const { return op.window ? std::max<int64_t>(0, Position(t) + 1 - op.window) : 0; }
};

inline float Product(const float* a, const float* b, int64_t width) {
  V total = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) total += Load(a + i) * Load(b + i);
  return Sum(total + (i < width ? LoadSome(a + i, width - i) * LoadSome(b + i, width - i) : V{}));
}

// Products of one row with four others, one after another in memory.
inline void Products(const float* a, const float* b, int64_t width, float* to) {
  V sums[4] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const V x = Load(a + i);
    for (int j = 0; j < 4; ++j) sums[j] += x * Load(b + j * width + i);
  }
  if (i < width) {
    const V x = LoadSome(a + i, width - i);
    for (int j = 0; j < 4; ++j) sums[j] += x * LoadSome(b + j * width + i, width - i);
  }
  SumFour(sums, to);
}

// Sixteen keys, one a lane: turned[width][16].
inline void Turn(const float* keys, int64_t width, int64_t count, float* turned) {
  for (int64_t j = 0; j < kLanes; ++j) {
    for (int64_t i = 0; i < width; ++i) turned[i * kLanes + j] = j < count ? keys[j * width + i] : 0.0f;
  }
}

// Scores of R tokens with the keys in `turned`, each to its row of `scores`.
template <int R>
void Score(const Head& h, int64_t t, const float* turned, float* scores, int64_t stride) {
  V sums[R] = {};
  const float* q[R];
  for (int r = 0; r < R; ++r) q[r] = h.Query(t + r);
  for (int64_t i = 0; i < h.op.width; ++i) {
    const V key = Load(turned + i * kLanes);
    for (int r = 0; r < R; ++r) sums[r] += key * q[r][i];
  }
  for (int r = 0; r < R; ++r) Store(scores + r * stride, sums[r]);
}

// Sixteen scores from place j, scaled and capped.
inline V Scaled(const Attention& op, const float* scores, int64_t j, int64_t last) {
  const auto scale = static_cast<float>(Number(op.scale)), cap = static_cast<float>(Number(op.softcap));
  const V x = (last - j >= kLanes ? Load(scores + j) : LoadSome(scores + j, last - j)) * scale;
  return cap != 0.0f ? cap * Tanh(x / cap) : x;
}

inline V Until(V x, int64_t count, float rest) {
  return count >= kLanes ? x : Places() < Fill(static_cast<float>(count)) ? x : Fill(rest);
}

// Scores to weights that sum to 1, between first and last; rows have room for whole vectors.
inline void Softmax(const Attention& op, float* scores, int64_t first, int64_t last) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  V most = Fill(kLeast), total = {};
  for (int64_t j = first; j < last; j += kLanes) {
    const V x = Scaled(op, scores, j, last);
    last - j >= kLanes ? Store(scores + j, x) : StoreSome(scores + j, x, last - j);
    most = Max(Until(x, last - j, kLeast), most);
  }
  const float largest = Largest(most);
  for (int64_t j = first; j < last; j += kLanes) {
    const int64_t count = std::min(kLanes, last - j);
    const V x = Until(Exp(LoadSome(scores + j, count) - largest), count, 0.0f);
    StoreSome(scores + j, x, count);
    total += x;
  }
  const float factor = 1.0f / Sum(total);
  for (int64_t j = first; j < last; ++j) scores[j] *= factor;
}

// C vectors of the result from place `at` for R tokens: weights times values.
template <int R, int C>
void Mix(const Head& h, int64_t t, int64_t at, const float* weights, int64_t stride, int64_t first, int64_t last) {
  V sums[R][C] = {};
  for (int64_t j = first; j < last; ++j) {
    const float* value = h.values + j * h.op.value_width + at;
    for (int c = 0; c < C; ++c) {
      const V v = Load(value + c * kLanes);
      for (int r = 0; r < R; ++r) sums[r][c] += v * weights[r * stride + j];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) Store(h.Result(t + r) + at + c * kLanes, sums[r][c]);
  }
}

template <int R>
void MixAll(const Head& h, int64_t t, const float* weights, int64_t stride, int64_t first, int64_t last) {
  int64_t at = 0;
  const int64_t width = h.op.value_width;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes) Mix<R, 4>(h, t, at, weights, stride, first, last);
  for (; at + kLanes <= width; at += kLanes) Mix<R, 1>(h, t, at, weights, stride, first, last);
  for (; at < width; ++at) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t j = first; j < last; ++j) sum += weights[r * stride + j] * h.values[j * width + at];
      h.Result(t + r)[at] = sum;
    }
  }
}

// Scores of one token with the keys that it sees, as they lie.
inline void ScoreAlone(const Head& h, int64_t t, float* scores) {
  const int64_t last = h.Last(t), width = h.op.width;
  int64_t j = h.First(t);
  for (; j + 4 <= last; j += 4) Products(h.Query(t), h.keys + j * width, width, scores + j);
  for (; j < last; ++j) scores[j] = Product(h.Query(t), h.keys + j * width, width);
}

// Scores of tokens t..t+count, each key turned once for all of them.
inline void ScoreTogether(const Head& h, int64_t t, int64_t count, int64_t first, int64_t last, float* scores,
                          int64_t stride, float* turned) {
  for (int64_t j = first; j < last; j += kLanes) {
    Turn(h.keys + j * h.op.width, h.op.width, std::min(kLanes, h.op.capacity - j), turned);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) Score<4>(h, t + i, turned, scores + i * stride + j, stride);
    for (; i < count; ++i) Score<1>(h, t + i, turned, scores + i * stride + j, stride);
  }
}

// Tokens t..stop; what a token does not see weighs 0.
inline void Attend(const Head& h, int64_t t, int64_t stop, std::vector<float>& room) {
  const int64_t count = stop - t, stride = (h.op.capacity + kLanes - 1) / kLanes * kLanes;
  room.resize(std::max<size_t>(room.size(), count * stride + h.op.width * kLanes));
  float* scores = room.data();
  int64_t first = h.op.capacity, last = 0;
  for (int64_t i = t; i < stop; ++i) first = std::min(first, h.First(i)), last = std::max(last, h.Last(i));
  first = first / kLanes * kLanes;
  if (count >= kMany) ScoreTogether(h, t, count, first, last, scores, stride, scores + count * stride);
  for (int64_t i = 0; i < count; ++i) {
    float* row = scores + i * stride;
    if (count < kMany) ScoreAlone(h, t + i, row);
    const int64_t from = h.First(t + i), to = h.Last(t + i);
    std::fill(row + first, row + std::max(first, from), 0.0f);
    std::fill(row + to, row + std::max(to, last), 0.0f);
    Softmax(h.op, row, from, to);
  }
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) MixAll<4>(h, t + i, scores + i * stride, stride, first, last);
  for (; i < count; ++i) MixAll<1>(h, t + i, scores + i * stride, stride, first, last);
}

inline int64_t Blocks(const Attention& op) { return (op.tokens + kQueries - 1) / kQueries; }
inline int64_t Tasks(const Attention& op) { return op.batch * op.heads * Blocks(op); }

inline void Run(const Attention& op, const Memory& memory, int64_t task) {
  thread_local std::vector<float> room;
  // Late blocks see most keys: they go first, so that none is waited for at the end.
  const int64_t blocks = Blocks(op), block = blocks - 1 - task / (op.batch * op.heads);
  const int64_t which = task % (op.batch * op.heads);
  const Head head(op, memory, which / op.heads, which % op.heads);
  Attend(head, block * kQueries, std::min(op.tokens, (block + 1) * kQueries), room);
}

}  // namespace effc
