// Ternary values and their decomposition of a float matrix.
//
// ternary_decompose: W [N, K] ~ sum_{i < terms} gamma[i, n] * T[i, n, :], T in {-1, 0, 1}, greedily:
//   R_1 = W;  (T_i, gamma_i) = ternarize(R_i);  R_{i+1} = R_i - gamma_i T_i        float32, one rounding an operation
// ternarize(R), over a row (kPerRow) or over the whole matrix (kPerMatrix: the same gamma in every row), a = mean|R| in double:
//   kThreshold  D = threshold * a;  t = 0 where |r| <= D, else sign(r);  gamma = mean of |r| over |r| > D, 0 if there are none:
//               the least-squares scale for the given T. Source: Li, Zhang, Liu, "Ternary weight networks" (2016), section 2.2,
//               where threshold = 0.7 is shown to be near the optimum for uniform and normal weights.
//   kAbsMean    t = clamp(rint(r / a), -1, 1);  gamma = a. Source: Ma et al., "The era of 1-bit LLMs" (2024), section 2.
//               Ties to even. threshold is not used. a = 0 gives t = 0.
// Greedy terms never raise the squared error under kThreshold, which is the best scale for its T.
//
// w      float32, float16, bfloat16 or float64 (rounded to float32) [N, K], row stride in elements
// trits  int8 [terms, N, K], contiguous; gamma float32 [terms, N], contiguous; both written whole. N, K may be 0.
// Errors: std::invalid_argument for terms < 1, a threshold below 0 or not finite, sizes, missing arrays, a NaN or infinite w.
// Threads: parallel over rows. Workspace, on the heap: one float row a range of rows and a few numbers a row. Sums are formed
// row by row and added in row order, so the result does not depend on the number of threads.
//
// pack_base3 / unpack_base3: the flat arrays of formats/base3.h. pack refuses a value outside {-1, 0, 1}, unpack a byte above
// 242 or a byte count other than base3_bytes(count): std::invalid_argument naming the position.
#pragma once
#include <cstdint>
#include <string_view>

#include "subbyte/base/dtype.h"

namespace subbyte {

enum class TernaryMethod : uint8_t { kThreshold, kAbsMean };
enum class TernaryScale : uint8_t { kPerRow, kPerMatrix };

// "threshold", "absmean". Throws std::invalid_argument listing them.
TernaryMethod ternary_method_from_name(std::string_view name);

struct TernaryDecomposeParams {
  const void* w = nullptr;
  DType dtype = DType::kF32;
  int64_t n = 0, k = 0;
  int64_t w_stride = 0;
  int64_t terms = 1;
  TernaryMethod method = TernaryMethod::kThreshold;
  TernaryScale scale = TernaryScale::kPerRow;
  float threshold = 0.7f;
  int8_t* trits = nullptr;
  float* gamma = nullptr;
};
void ternary_decompose(const TernaryDecomposeParams& p);

void pack_base3(const int8_t* trits, int64_t count, uint8_t* bytes);
void unpack_base3(const uint8_t* bytes, int64_t bytes_count, int8_t* trits, int64_t count);

}  // namespace subbyte
