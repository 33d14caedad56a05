// Stages run by threads that meet between them.
//
// Each stage has tasks that threads take one after another; a stage begins when all tasks of the one
// before are done. A thread of the pool that comes late joins where the work is, one that never comes is
// not waited for: whoever calls can finish alone. So nobody waits but for a task that a thread is running:
// for a short while by turning, then asleep, since on a busy machine that thread may want this processor.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "embed.h"
#include "outline.h"
#include "rowops.h"

namespace effc {

constexpr int kPatience = 1 << 14;  // turns before a waiting thread sleeps: some tenths of a millisecond
constexpr int64_t kParts = 8;  // parts of a stage's tasks at most, a thread's own first
constexpr int64_t kHoard = 64 << 10;  // bytes of the next product that a waiting thread asks for

inline void Pause() {
#ifdef EFFC_X86
  _mm_pause();
#endif
}

struct alignas(64) Progress {
  std::atomic<int64_t> next[kParts] = {}, done{0};
};

// The stretch of memory that a thread reads first in the next product; it grows shorter as it is asked for.
struct Hoard {
  uintptr_t at = 0, stop = 0;
  size_t stage = 0;
};

class Work {
 public:
  Work(const int64_t* words, Memory memory, int64_t threads)
      : memory_(std::move(memory)), threads_(threads), outline_(Outline::Of(words, memory_, threads)),
        stages_(outline_->stages), counts_(outline_->counts), progress_(stages_.size()),
        flags_(outline_->header().flags) {
    for (const size_t i : outline_->changing) counts_[i] = Tasks(*stages_[i], memory_, threads);
  }

  // Until every stage is done, whoever did it. Buffers may be gone when a thread comes late: without a task in hand
  // it looks at counts and addresses alone. me: the number of the thread.
  void Go(int64_t me) {
    const int64_t parts = std::min(threads_, kParts), mine = me % parts;
    Hoard hoard;
    for (size_t i = 0; i < stages_.size(); ++i) {
      Progress& progress = progress_[i];
      const Stage& stage = *stages_[i];
      if (stage.flag >= 0 && flags_[stage.flag].load(std::memory_order_relaxed) != stage.wanted) continue;
      const int64_t count = counts_[i];
      for (int64_t task; progress.done.load(std::memory_order_acquire) < count;) {
        if ((task = Take(progress, parts, mine, count)) < 0) {
          Wait(progress, count, Upcoming(hoard, i, me));
          break;
        }
        RunTask(stage, task);
        Done(progress, count);
      }
    }
  }

 private:
  // A task nobody has, of the thread's own part as long as there is one: part, part + parts, ...; else -1.
  static int64_t Take(Progress& progress, int64_t parts, int64_t mine, int64_t count) {
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t part = (mine + i) % parts;
      const auto task = [&](int64_t n) { return part + n * parts; };
      if (task(progress.next[part].load(std::memory_order_relaxed)) >= count) continue;
      const int64_t taken = task(progress.next[part].fetch_add(1));
      if (taken < count) return taken;
    }
    return -1;
  }

  // Memory is idle while a thread waits: it asks for what it reads next.
  void Wait(const Progress& progress, int64_t count, Hoard& hoard) {
    for (int turn = 0; turn < kPatience; ++turn) {
      if (progress.done.load(std::memory_order_acquire) >= count) return;
      if (hoard.at < hoard.stop) {
        Ask<2>(reinterpret_cast<const void*>(hoard.at), 0);
        hoard.at += 64;
      } else {
        Pause();
      }
    }
    std::unique_lock<std::mutex> lock(lock_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return progress.done.load() >= count; });
    sleepers_.fetch_sub(1);
  }

  // Either a sleeper sees the count, or this sees the sleeper: both orders are sequentially consistent.
  void Done(Progress& progress, int64_t count) {
    if (progress.done.fetch_add(1) + 1 < count || !sleepers_.load()) return;
    const std::lock_guard<std::mutex> lock(lock_);
    wake_.notify_all();
  }

  // What the thread reads first in the next product after this stage.
  Hoard& Upcoming(Hoard& hoard, size_t stage, int64_t me) const {
    const std::vector<Reading>& readings = outline_->readings;
    size_t i = stage + 1;
    while (i < readings.size() && !readings[i].tasks) ++i;
    if (i < readings.size() && i != hoard.stage) {
      const Reading& next = readings[i];
      const int64_t mine = (next.tasks - me + threads_ - 1) / threads_;
      const auto codes = reinterpret_cast<uintptr_t>(memory_.At<char>(next.codes));
      const uintptr_t from = codes + Place(me, next.tasks, threads_) * next.bytes;
      hoard = {from, from + std::max<int64_t>(0, std::min(kHoard, mine * next.bytes)), i};
    }
    return hoard;
  }

  void RunTask(const Stage& stage, int64_t task) {
    const Op* op = FirstOp(stage);
    if (stage.rows) {
      const int64_t each = RowsOfTask(stage, threads_), start = task * each, stop = std::min(stage.rows, start + each);
      for (int64_t i = 0; i < stage.ops; ++i, op = NextOp(op)) {
        for (int64_t row = start; row < stop; ++row) RunRow(*op, row);
      }
      return;
    }
    for (int64_t count; task >= (count = Tasks(*op, memory_, threads_)); op = NextOp(op)) task -= count;
    if (op->code == kDecide) return Set(static_cast<const Decide&>(*op));
    if (op->code == kLinear) return Run(static_cast<const Linear&>(*op), memory_, threads_, task);
    if (op->code == kProduct) return Run(static_cast<const Product&>(*op), memory_, threads_, task);
    Run(static_cast<const Attention&>(*op), memory_, task);
  }

  // Tasks of stages that will be passed over are not counted: there may be many. Whoever sees this op done sees all.
  void Set(const Decide& op) {
    const int64_t decided = All(op, memory_);
    for (size_t i = 0; i < stages_.size(); ++i) {
      const Stage& stage = *stages_[i];
      if (stage.flag == op.flag && stage.wanted == decided) counts_[i] = Tasks(stage, memory_, threads_);
    }
    flags_[op.flag].store(decided, std::memory_order_relaxed);
  }

  void RunRow(const Op& op, int64_t row) const {
    switch (op.code) {
      case kNorm: return Run(static_cast<const Norm&>(op), memory_, row);
      case kQuantize: return Run(static_cast<const Quantize&>(op), memory_, row);
      case kRope: return Run(static_cast<const Rope&>(op), memory_, row);
      case kAppend: return Run(static_cast<const Append&>(op), memory_, row);
      case kMap: return Run(static_cast<const Map&>(op), memory_, row);
      case kArgmax: return Run(static_cast<const Argmax&>(op), memory_, row);
      case kSure: return Run(static_cast<const Sure&>(op), memory_, row);
      case kSelect: return Run(static_cast<const Select&>(op), memory_, row);
      case kCount: return Run(static_cast<const Count&>(op), memory_, row);
      case kTurns: return Run(static_cast<const Turns&>(op), memory_, row);
      case kEmbed: return Run(static_cast<const Embed&>(op), memory_, row);
      case kDense: return Run(static_cast<const Dense&>(op), memory_, row);
      case kJoin: return Run(static_cast<const Join&>(op), memory_, row);
    }
  }

  const Memory memory_;
  const int64_t threads_;
  const std::shared_ptr<const Outline> outline_;
  const std::vector<const Stage*>& stages_;
  std::vector<int64_t> counts_;
  std::vector<Progress> progress_;
  std::vector<std::atomic<int64_t>> flags_;
  std::mutex lock_;
  std::condition_variable wake_;
  std::atomic<int64_t> sleepers_{0};
};

}  // namespace effc
