// pack and unpack, one thread, kernel by kernel: bytes of codes a second, to be read against `copy_codes` of the same run. A
// kernel is compared with the reference before it is timed.
#include <benchmark/benchmark.h>

#include <cstring>
#include <string>
#include <vector>

#include "subbyte/formats/bits.h"
#include "subbyte/ops/pack/kernels.h"

namespace subbyte {
namespace {

constexpr int64_t kCount = 1 << 20;

void copy_codes(benchmark::State& state) {
  std::vector<uint8_t> from(kCount, 1), to(kCount);
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), kCount);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kCount);
}
BENCHMARK(copy_codes)->UseRealTime();

void move_codes(benchmark::State& state, const PackKernel& kernel, int bits, bool packs) {
  std::vector<uint8_t> codes(kCount), back(kCount), packed(size_t(stream_bytes(kCount, bits))), want(packed.size());
  for (int64_t k = 0; k < kCount; ++k) codes[size_t(k)] = uint8_t(k * 2654435761u >> 9 & ((1u << bits) - 1));
  reference::pack_codes(codes.data(), kCount, bits, want.data());
  kernel.pack(codes.data(), kCount, bits, packed.data());
  kernel.unpack(packed.data(), kCount, bits, back.data());
  if (packed != want || back != codes) return state.SkipWithError("differs from the reference");
  for (auto _ : state) {
    if (packs) kernel.pack(codes.data(), kCount, bits, packed.data());
    else kernel.unpack(packed.data(), kCount, bits, back.data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kCount);
}

const bool registered = [] {
  for (const PackKernel& kernel : pack_kernels()) {
    if (kernel.isa > detected_isa()) continue;
    for (int bits : {1, 3, 4, 8})
      for (bool packs : {true, false})
        benchmark::RegisterBenchmark(
            (std::string(packs ? "pack/" : "unpack/") + kernel.name + "/" + std::to_string(bits) + "_bits").c_str(),
            [&kernel, bits, packs](benchmark::State& state) { move_codes(state, kernel, bits, packs); })
            ->UseRealTime();
  }
  return true;
}();

}  // namespace
}  // namespace subbyte
