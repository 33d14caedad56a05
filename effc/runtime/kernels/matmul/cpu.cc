// y[R,N] f32 = x[R,K] f32 times a quantized matrix, for few rows: codes are widened in registers.
//
// Layout kn: codes [K,N], scales [ceil(K/group),N]; layout nk: codes [N,K], scales [N,ceil(K/group)].
// Up to 4 bits two codes share a byte along the last axis, low half first, each two's complement.
// A weight is (code - zero) * scale; sums over a group (or a piece of one) are f32 and scaled once.

#include <atomic>
#include <memory>
#include <thread>

#include "columns.h"
#include "rows.h"

namespace {

constexpr int64_t kAlone = 48 * 1024;  // bytes of codes times rows below which waking a thread costs more
constexpr int64_t kLarge = 4 << 20;    // bytes of codes worth cutting finely, so that no thread waits long

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
