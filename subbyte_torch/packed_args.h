// The arguments that spell a packed weight W [N, K] in every op schema, and what follows from them for shapes.
//
//   codes        uint8 [N, row_bytes]        canonical code streams
//   scales       f32/f16/bf16 [N, G]         G = ceil(in_features / group_size)
//   zeros        f32/f16/bf16 [N, G] or none in units of codes
//   offsets      f32/f16/bf16 [N, G] or none in units of values; at most one of zeros and offsets
//   perm         int32 [K] or none           stored column k is input feature perm[k]
//   format       row layout, "uint4" or "uint8*64+uint4*448" (subbyte/formats/format.h)
//   in_features  K
//   group_size   columns that share a scale
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

#define SB_PACKED_SCHEMA \
  "Tensor codes, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, str format, int in_features, int group_size"
// The same as a C++ parameter list, and as arguments.
#define SB_PACKED_PARAMS                                                                                    \
  const at::Tensor &codes, const at::Tensor &scales, const subbyte::OptionalTensor &zeros,                  \
      const subbyte::OptionalTensor &offsets, const subbyte::OptionalTensor &perm, std::string_view format, \
      int64_t in_features, int64_t group_size
#define SB_PACKED codes, scales, zeros, offsets, perm, format, in_features, group_size

namespace subbyte {

using OptionalTensor = std::optional<at::Tensor>;

inline bool given(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// References to a call's arguments; lives no longer than the call.
struct PackedArgs {
  const at::Tensor& codes;
  const at::Tensor& scales;
  const OptionalTensor& zeros;
  const OptionalTensor& offsets;
  const OptionalTensor& perm;
  std::string_view format;
  int64_t in_features;
  int64_t group_size;
};

// Bytes of a row of K codes, and groups in a row; symbolic K stays symbolic where the format allows (mixed width does not).
c10::SymInt row_bytes_of(const char* op, std::string_view format, const c10::SymInt& k);
c10::SymInt groups_of(const char* op, const c10::SymInt& k, int64_t group_size);

// Throws ValueError naming `op` unless shapes and dtypes are as above. Needs no data: holds for meta and fake tensors.
void check_packed(const char* op, const PackedArgs& w);
// Scales, zeros, offsets and perm of a matrix [n, k]; what encode knows before there are codes.
void check_affine(const char* op, const c10::SymInt& n, const c10::SymInt& k, const at::Tensor& scales,
                  const OptionalTensor& zeros, const OptionalTensor& offsets, const OptionalTensor& perm, int64_t group_size);
// x [..., features], floating point.
void check_features(const char* op, const char* name, const at::Tensor& x, const c10::SymInt& features);
// The gradient handle: floating point [N, K].
void check_handle(const char* op, const OptionalTensor& weight, const c10::SymInt& n, int64_t k);

}  // namespace subbyte
