// What the operators that read files share: tensors that own their memory, and JSON text.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <string_view>
#include <vector>

#include "subbyte/io/tensor_data.h"

namespace subbyte {

// A copy of a file's bytes. at::Error for an element type that PyTorch lacks, naming the tensor.
at::Tensor owned_tensor(const SharedBytes& bytes, at::IntArrayRef shape, ElementType type, const std::string& name);
// codes, scales, zeros or offsets, perm, residual: those that the weight has.
std::vector<at::Tensor> owned_parts(const PackedTensor& packed);
// "fixed", "zeros" or "offsets".
const char* zero_kind_name(ZeroKind kind);

}  // namespace subbyte
