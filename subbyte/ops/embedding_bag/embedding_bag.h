// out[b, :] = one row for the look-ups j in [begin_b, end_b) of bag b, those equal to padding_idx left out
//
//   kSum       sum_j weights[j] * table[indices[j], :]
//   kMean      sum_j table[indices[j], :] / L,  L = the number of look-ups that count
//   kMajority  +1 where at least ceil(L / 2) of the L bits are 1, else -1: ties give +1; tables of one-bit codes (sign), whose
//              scales are not looked at
//   A bag without look-ups gives 0 in every mode.
//
// indices  int64 or int32 [count], each in [0, N)
// offsets  int64 [bags], not decreasing, the first 0: begin_b = offsets[b], end_b = offsets[b + 1], or count for the last.
// Null:
//          every bag has bag_size look-ups, count = bags * bag_size
// weights  float32 [count] or null (all 1); kSum only
// table    packed [N, K] as in dequantize (perm as there)
// out      float32, float16, bfloat16 or float64 [bags, K], row stride in elements
//
// Values are those of dequantize in float32, added in float32 from +0 in the order of j, products apart; one rounding to out's
// type. Same bits on every path, thread count and device.
// bags, count, N, K may be 0. Errors: std::out_of_range for an index outside [0, N) (CPU); std::invalid_argument for sizes,
// missing arrays, offsets that decrease, do not start at 0 or end after count (CPU), a mode the table or weights do not fit.
// Threads: parallel over bags. Workspace: two rows of float32 a thread's share, allocated by the entry. Cost grows with count,
// never with N.
#pragma once
#include "subbyte/formats/packed_matrix.h"

namespace subbyte {

enum class BagMode : uint8_t { kSum, kMean, kMajority };

struct EmbeddingBagParams {
  PackedMatrix table;
  const void* indices = nullptr;
  bool indices_are_int64 = true;
  int64_t count = 0;
  const int64_t* offsets = nullptr;
  int64_t bags = 0, bag_size = 0;
  const float* weights = nullptr;
  int64_t padding_idx = -1;
  BagMode mode = BagMode::kSum;
  void* out = nullptr;
  DType out_dtype = DType::kF32;
  int64_t out_stride = 0;

  SB_MEMBER_HD int64_t begin(int64_t b) const { return offsets != nullptr ? offsets[b] : b * bag_size; }
  SB_MEMBER_HD int64_t end(int64_t b) const {
    return offsets == nullptr ? (b + 1) * bag_size : b + 1 < bags ? offsets[b + 1] : count;
  }
  SB_MEMBER_HD int64_t index(int64_t j) const {
    return indices_are_int64 ? static_cast<const int64_t*>(indices)[j] : static_cast<const int32_t*>(indices)[j];
  }
};
void embedding_bag(const EmbeddingBagParams& p);
// The checks of the entry that need no content; shared by the CPU and CUDA entries. False when there is nothing to write.
bool check_sizes(const EmbeddingBagParams& p);

}  // namespace subbyte
