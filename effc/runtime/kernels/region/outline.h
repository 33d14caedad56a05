// What each call of a program needs to know of it, worked out once: its stages, their tasks, what products read.

#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "attention.h"
#include "choice.h"
#include "product.h"

namespace effc {

constexpr int64_t kFew = 16;  // rows that are not worth cutting finely
constexpr size_t kKept = 256;  // outlines

inline const Op* FirstOp(const Stage& stage) { return reinterpret_cast<const Op*>(&stage + 1); }
inline const Op* NextOp(const Op* op) {
  return reinterpret_cast<const Op*>(reinterpret_cast<const int64_t*>(op) + op->words);
}

inline int64_t RowsOfTask(const Stage& stage, int64_t threads) {
  const int64_t parts = stage.rows <= kFew ? threads : 4 * threads;
  return (stage.rows + parts - 1) / parts;
}

inline int64_t Tasks(const Op& op, const Memory& memory, int64_t threads) {
  if (op.code == kDecide) return 1;
  if (op.code == kLinear) return Tasks(static_cast<const Linear&>(op), memory, threads);
  if (op.code == kProduct) return Tasks(static_cast<const Product&>(op), memory, threads);
  return Tasks(static_cast<const Attention&>(op), memory);
}

inline int64_t Tasks(const Stage& stage, const Memory& memory, int64_t threads) {
  if (stage.rows) return (stage.rows + RowsOfTask(stage, threads) - 1) / RowsOfTask(stage, threads);
  int64_t total = 0;
  const Op* op = FirstOp(stage);
  for (int64_t i = 0; i < stage.ops; ++i, op = NextOp(op)) total += Tasks(*op, memory, threads);
  return total;
}

// The codes that the first product of a stage reads, its tasks and their bytes; no tasks where there is none.
struct Reading {
  Ref codes;
  int64_t tasks = 0, bytes = 0;
};

class Outline {
 public:
  // The one of this program for so many threads.
  static std::shared_ptr<const Outline> Of(const int64_t* words, const Memory& memory, int64_t threads) {
    struct Known {
      std::mutex lock;
      std::unordered_map<int64_t, std::shared_ptr<const Outline>> outlines;
    };
    static auto* known = new Known;
    const int64_t key = reinterpret_cast<const Header*>(words)->key ^ (threads << 56);
    const std::lock_guard<std::mutex> lock(known->lock);
    auto& found = known->outlines[key];
    if (found) return found;
    auto made = std::make_shared<const Outline>(words, memory, threads);
    if (known->outlines.size() > kKept) known->outlines.clear();
    return known->outlines[key] = std::move(made);
  }

  Outline(const int64_t* words, const Memory& memory, int64_t threads)
      : words_(words, words + reinterpret_cast<const Header*>(words)->words) {
    const int64_t* at = words_.data() + sizeof(Header) / sizeof *words;
    for (int64_t i = 0; i < header().stages; ++i) {
      const auto* stage = reinterpret_cast<const Stage*>(at);
      at += stage->words;
      stages.push_back(stage);
      const bool always = stage->flag < 0;
      counts.push_back(always ? Tasks(*stage, memory, threads) : 0);
      if (always && Attends(*stage)) changing.push_back(i);
      readings.push_back(ReadingOf(*stage, memory, threads));
    }
  }

  const Header& header() const { return *reinterpret_cast<const Header*>(words_.data()); }

  std::vector<const Stage*> stages;
  std::vector<int64_t> counts;  // tasks of each stage, 0 where a branch may pass it over
  std::vector<size_t> changing;  // stages whose tasks are others in each call
  std::vector<Reading> readings;

 private:
  static bool Attends(const Stage& stage) {
    const Op* op = FirstOp(stage);
    for (int64_t i = 0; i < stage.ops; ++i, op = NextOp(op)) {
      if (op->code == kAttention) return true;
    }
    return false;
  }

  static Reading ReadingOf(const Stage& stage, const Memory& memory, int64_t threads) {
    const Op* op = FirstOp(stage);
    if (stage.rows || op->code != kLinear) return {};
    const auto& linear = static_cast<const Linear&>(*op);
    const Matrix m(linear, memory);
    return {linear.codes, TasksOf(m, threads), PanelsOfTask(m, threads) * m.panel_bytes};
  }

  // A copy: the program's own may be gone when a thread comes late.
  const std::vector<int64_t> words_;
};

}  // namespace effc
