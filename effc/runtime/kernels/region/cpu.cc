// A native region: the ops of `program` (program.h) over the buffers of a call, by our threads or XLA's.

#include <cstdlib>
#include <memory>
#include <mutex>

#include "crew.h"
#include "pack.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Scratch memory kept between calls: as much as the calls under way at once have needed.
class Scratch {
 public:
  explicit Scratch(size_t size) : size_(size) {
    const std::lock_guard<std::mutex> lock(Lock());
    for (auto& block : Free()) {
      if (block.second < size) continue;
      std::swap(block, Free().back());
      block_ = Free().back();
      Free().pop_back();
      return;
    }
    for (auto& block : Free()) std::free(block.first);
    Free().clear();
    const size_t whole = (size + 63) / 64 * 64 + 64;
    block_ = {static_cast<char*>(std::aligned_alloc(64, whole)), whole};
  }

  ~Scratch() {
    const std::lock_guard<std::mutex> lock(Lock());
    Free().push_back(block_);
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* data() const { return block_.first; }

 private:
  using Block = std::pair<char*, size_t>;

  static std::mutex& Lock() {
    static auto* lock = new std::mutex;
    return *lock;
  }
  static std::vector<Block>& Free() {
    static auto* blocks = new std::vector<Block>;
    return *blocks;
  }

  size_t size_;
  Block block_;
};

ffi::Error Region(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  ffi::Span<const int64_t> program) {
  effc::Memory memory;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    memory.buffers.push_back(static_cast<char*>(buffer->untyped_data()));
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer) return buffer.error();
    memory.buffers.push_back(static_cast<char*>((*buffer)->untyped_data()));
  }
  const Scratch scratch(reinterpret_cast<const effc::Header*>(program.begin())->scratch);
  memory.scratch = scratch.data();
  const int64_t threads = pool.num_threads();
  // Threads that come when all is done look at this alone.
  auto work = std::make_shared<effc::Work>(program.begin(), std::move(memory), threads);
  for (int64_t i = 1; i < threads; ++i) {
    effc::Helper* helper = effc::Helper::Of(i - 1);
    if (!helper || !helper->Take(work, i)) pool.Schedule([work, i] { work->Go(i); });
  }
  work->Go(0);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EffcRegion, Region,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("program"));

extern "C" void EffcPack(const uint8_t* codes, int64_t inner, int64_t outer, int64_t bits, int64_t kn, uint8_t* to) {
  effc::PackCodes({codes, inner, outer, bits, kn}, to);
}

extern "C" void EffcPackScales(const uint8_t* from, int64_t groups, int64_t outer, int64_t size, int64_t kn,
                               uint8_t* to) {
  effc::PackScales(from, groups, outer, size, kn != 0, to);
}

// Reads memory once, as fast as one thread can; what it gives keeps the compiler from leaving that out.
extern "C" int64_t EffcStream(const uint8_t* from, int64_t bytes) {
  effc::VI parts[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
    for (int j = 0; j < 4; ++j) parts[j] ^= effc::LoadAs<effc::VI>(from + i + 64 * j);
  }
  const effc::VI all = parts[0] ^ parts[1] ^ parts[2] ^ parts[3];
  int64_t sum = 0;
  for (int i = 0; i < effc::kLanes; ++i) sum += all[i];
  return sum;
}

// The instructions that products use.
extern "C" const char* EffcFeatures() {
#if defined(EFFC_AVX512) && defined(__AVX512VNNI__)
  return "AVX-512 VNNI";
#elif defined(EFFC_AVX512)
  return "AVX-512";
#elif defined(EFFC_X86)
  return "AVX2";
#else
  return "plain C++";
#endif
}
