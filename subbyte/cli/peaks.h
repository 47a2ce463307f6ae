// Arithmetic peaks of one core, by instruction set: loops of independent multiply-adds on registers.
#pragma once
#include <cstdint>

namespace subbyte::cli {

// Each runs `iterations` rounds and stores a sum to `sink`, so that nothing is dropped. Operations a round:
inline constexpr int64_t kFmaFlopsAvx2 = 12 * 8 * 2, kFmaFlopsAvx512 = 12 * 16 * 2;
inline constexpr int64_t kDotOpsAvx2 = 12 * 32 * 2, kDotOpsAvx512Vnni = 12 * 64 * 2;
void fma_rounds_avx2(int64_t iterations, float* sink) noexcept;
void fma_rounds_avx512(int64_t iterations, float* sink) noexcept;
// u8 x s8 products summed to int32: vpmaddubsw + vpmaddwd + vpaddd, and vpdpbusd.
void dot_rounds_avx2(int64_t iterations, float* sink) noexcept;
void dot_rounds_avx512_vnni(int64_t iterations, float* sink) noexcept;

}  // namespace subbyte::cli
