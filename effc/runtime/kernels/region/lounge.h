// Threads that wait a moment for the next call: a decoder calls again at once, and waking a thread takes 40 us.
//
// They are the pool's, which may want them for work of others meanwhile: where nothing came lately, few stay.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "threads.h"

namespace effc {

constexpr int kStay = 1 << 12;   // turns that a thread waits: about 80 us
constexpr int kTrust = 8;        // calls that came, or did not, which decide whether threads stay
constexpr unsigned kTrial = 16;  // where they do not, every so many tries one does all the same

class Lounge {
 public:
  // Gives the work to threads that wait, numbered from 1 on; how many there were, `wanted` at most.
  static int64_t Offer(const std::shared_ptr<Work>& work, int64_t wanted) {
    int64_t given = 0;
    for (Seat& seat : Seats()) {
      if (given == wanted) break;
      int waiting = kWaiting;
      if (!seat.state.compare_exchange_strong(waiting, kTaken)) continue;
      seat.work = work;
      seat.number = ++given;
      seat.state.store(kCalled, std::memory_order_release);  // until its thread has done the work
    }
    return given;
  }

  // What a thread does after its work: that of calls that come soon.
  static void Stay() {
    if (!Worth()) return;
    for (Seat& seat : Seats()) {
      int empty = kEmpty;
      if (!seat.state.compare_exchange_strong(empty, kWaiting)) continue;
      while (Called(seat)) {
        seat.work->Go(seat.number);
        seat.work.reset();
        seat.state.store(kWaiting, std::memory_order_release);
      }
      return;
    }
  }

 private:
  enum State : int { kEmpty, kWaiting, kTaken, kCalled };  // by whom: nobody, a thread, who calls, a thread again

  struct alignas(64) Seat {
    std::atomic<int> state{kEmpty};
    std::shared_ptr<Work> work;
    int64_t number = 0;
  };

  static Seat (&Seats())[kParts] {
    static auto* seats = new Seat[1][kParts];
    return seats[0];
  }

  static std::atomic<int>& Trust() {
    static std::atomic<int> trust{kTrust};
    return trust;
  }

  static bool Worth() {
    static std::atomic<unsigned> tries{0};
    return Trust().load(std::memory_order_relaxed) > 0 || tries.fetch_add(1) % kTrial == 0;
  }

  // Whether a call came to the seat; else it is empty again.
  static bool Called(Seat& seat) {
    for (int turn = 0; turn < kStay; ++turn) {
      if (seat.state.load(std::memory_order_acquire) == kCalled) return Learn(true);
      Pause();
    }
    int waiting = kWaiting;
    if (seat.state.compare_exchange_strong(waiting, kEmpty)) return Learn(false);
    while (seat.state.load(std::memory_order_acquire) != kCalled) Pause();
    return Learn(true);
  }

  static bool Learn(bool came) {
    std::atomic<int>& trust = Trust();
    const int now = trust.load(std::memory_order_relaxed) + (came ? 1 : -1);
    trust.store(std::clamp(now, -kTrust, kTrust), std::memory_order_relaxed);
    return came;
  }
};

}  // namespace effc
