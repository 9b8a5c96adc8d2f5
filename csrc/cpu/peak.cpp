#include "peak.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "../parallel.h"
#include "memory.h"

namespace fr {
namespace {

// The best of several repetitions counts: disturbances only ever lower a measured peak.
constexpr int kRepeats = 10;
constexpr double kSecondsEach = 5e-3;

// Size of each buffer: several times the L3 cache of one core complex of a server. Several times
// that of a whole socket would take too long.
constexpr int64_t kBufferBytes = 256 * 1024 * 1024;

// Seconds until every thread i has done work(i).
template <class Work>
double seconds(const Work& work) {
  const int64_t threads = get_num_threads();
  const auto start = std::chrono::steady_clock::now();
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double peak_flops(DType dtype) {
  const PeakKernels& peak = kernels().peak;
  const auto loop = dtype == kFloat64                         ? peak.multiply_add_float64
                    : dtype == kBFloat16 && peak.dot_bfloat16 ? peak.dot_bfloat16
                                                              : peak.multiply_add_float32;
  const double threads = get_num_threads();
  double best = 0;
  // At least a fraction of a millisecond of work, so that thread start-up does not count.
  int64_t iterations = 64 * 1024;
  for (int repeat = 0; repeat < kRepeats;) {
    double each = 0;
    const double time = seconds([&](int64_t i) {
      const double flops = loop(iterations);
      if (i == 0) each = flops;
    });
    if (time < kSecondsEach) {
      iterations *= 2;
      continue;
    }
    best = std::max(best, each * threads / time);
    ++repeat;
  }
  return best;
}

Bandwidth memory_bandwidth() {
  const PeakKernels& peak = kernels().peak;
  const int64_t threads = get_num_threads();
  const int64_t step = 4096;  // bytes: whole pages, and whole strides of the loops
  const int64_t share = std::max(kBufferBytes / threads / step, int64_t{1}) * step;
  const Memory from = allocate(static_cast<size_t>(share * threads));
  const Memory to = allocate(static_cast<size_t>(share * threads));
  const auto part = [share](const Memory& buffer, int64_t i) {
    return reinterpret_cast<float*>(buffer.get() + i * share);
  };
  // Write the buffers first: untouched pages all map to the same page of zeros.
  seconds([&](int64_t i) {
    std::memset(part(from, i), 0, share);
    std::memset(part(to, i), 0, share);
  });
  const int64_t count = share / static_cast<int64_t>(sizeof(float));
  Bandwidth best{};
  const double bytes = static_cast<double>(share * threads);
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    best.read = std::max(
        best.read, bytes / seconds([&](int64_t i) { peak.read_memory(part(from, i), count); }));
    best.copy = std::max(best.copy, 2 * bytes / seconds([&](int64_t i) {
                                      peak.copy_memory(part(from, i), part(to, i), count);
                                    }));
  }
  return best;
}

}  // namespace fr
