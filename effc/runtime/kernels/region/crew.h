// Threads of our own that help with calls and stay awake for a moment after each.
//
// Programs call regions a few dozen microseconds apart, while waking a thread takes as long as a stage or two. XLA's
// threads cannot wait here: XLA needs them between calls.

#pragma once

#include <sched.h>

#include <cfenv>
#include <chrono>
#include <system_error>
#include <thread>

#include "threads.h"

namespace effc {
namespace {  // a process may load this code in several variants: each has threads of its own

constexpr std::chrono::microseconds kLinger{100};

class Helper {
 public:
  // Whether it takes this part of a call; it does not while it has another.
  bool Take(const std::shared_ptr<Work>& work, int64_t me) {
    State was = state_.load();
    if ((was != kAwake && was != kAsleep) || !state_.compare_exchange_strong(was, kChosen)) return false;
    work_ = work, me_ = me;
    std::fegetenv(&floats_);  // how XLA's threads round and treat subnormal numbers
    if (was == kAwake) {
      state_.store(kGiven);
    } else {
      { const std::lock_guard<std::mutex> lock(lock_); state_.store(kGiven); }
      wake_.notify_one();
    }
    return true;
  }

  // The `i`-th of the process, which lives as long as it does; none where there can be no more threads.
  static Helper* Of(size_t i) {
    static auto* lock = new std::mutex;
    static auto* crew = new std::vector<Helper*>;
    const std::lock_guard<std::mutex> guard(*lock);
    while (crew->size() <= i) {
      auto* helper = new Helper;
      try {
        std::thread([helper] { helper->Live(); }).detach();
      } catch (const std::system_error&) {
        delete helper;
        return nullptr;
      }
      crew->push_back(helper);
    }
    return (*crew)[i];
  }

 private:
  enum State { kAwake, kAsleep, kChosen, kGiven };

  [[noreturn]] void Live() {
    for (;;) {
      Await();
      std::fesetenv(&floats_);
      work_->Go(me_);
      work_.reset();
      state_.store(kAwake);
    }
  }

  // Others that want this processor get it.
  void Await() {
    const auto until = std::chrono::steady_clock::now() + kLinger;
    while (std::chrono::steady_clock::now() < until) {
      for (int turn = 0; turn < 32; ++turn) {
        if (state_.load() == kGiven) return;
        Pause();
      }
      sched_yield();
    }
    State was = kAwake;
    if (!state_.compare_exchange_strong(was, kAsleep)) {
      while (state_.load() != kGiven) Pause();  // chosen at the last moment, as one that is awake
      return;
    }
    std::unique_lock<std::mutex> lock(lock_);
    wake_.wait(lock, [&] { return state_.load() == kGiven; });
  }

  std::atomic<State> state_{kAwake};
  std::shared_ptr<Work> work_;
  int64_t me_ = 0;
  std::fenv_t floats_;
  std::mutex lock_;
  std::condition_variable wake_;
};

}  // namespace
}  // namespace effc
