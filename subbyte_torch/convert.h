// Between tensors and the core's views: the only place that touches data_ptr, and the only one that translates errors.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <stdexcept>
#include <string_view>

#include "subbyte/base/dtype.h"
#include "subbyte/base/error.h"
#include "subbyte/base/stream.h"
#include "subbyte/formats/packed_matrix.h"
#include "subbyte_torch/packed_args.h"

namespace subbyte {

// Runs f; the core's exceptions become PyTorch's: invalid_argument -> ValueError, out_of_range -> IndexError, files and devices
// -> RuntimeError. The text stays.
template <class F>
auto translated(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::invalid_argument& e) {
    TORCH_CHECK_VALUE(false, e.what());
  } catch (const std::out_of_range& e) {
    TORCH_CHECK_INDEX(false, e.what());
  } catch (const FormatError& e) {
    TORCH_CHECK(false, e.what());
  } catch (const DeviceError& e) {
    TORCH_CHECK(false, e.what());
  } catch (const IoError& e) {
    TORCH_CHECK(false, e.what());
  }
}

RowLayout layout_of(const char* op, std::string_view format, int64_t k);
// Throws ValueError for a type that the core does not have.
DType dtype_of(const char* op, const char* name, at::ScalarType type);
at::ScalarType scalar_type_of(DType type);

// ValueError "linear: codes is on cuda:0, x is on cpu" unless t is where `anchor` is.
void check_device(const char* op, const char* name, const at::Tensor& t, const char* anchor_name, const at::Tensor& anchor);

// A tensor of any leading dimensions as rows with contiguous columns. Copies only what cannot be described by a row stride.
struct Rows {
  at::Tensor tensor;  // [m, k]; keeps a copy alive
  int64_t m = 0;
  int64_t stride = 0;  // elements
  DType dtype = DType::kF32;
  const void* data() const { return tensor.const_data_ptr(); }
};
Rows rows_of(const char* op, const char* name, const at::Tensor& x);

// The core's view of a packed weight; holds contiguous versions of the parts.
struct PackedView {
  at::Tensor codes, scales, zeros, perm;
  PackedMatrix matrix;
};
// All parts must be on the device of `anchor`.
PackedView view_of(const char* op, const PackedArgs& w, const char* anchor_name, const at::Tensor& anchor);
// The same without codes, for ops that are about to make them.
PackedView affine_view_of(const char* op, int64_t n, int64_t k, const at::Tensor& scales, const OptionalTensor& zeros,
                          const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format,
                          int64_t group_size, const char* anchor_name, const at::Tensor& anchor);

// Contiguous vector [N] of the same device, or undefined. The pointer of an undefined tensor is null.
at::Tensor bias_of(const char* op, const OptionalTensor& bias, const char* anchor_name, const at::Tensor& anchor);
const void* data_of(const at::Tensor& t);
void* mutable_data_of(const at::Tensor& t);
// The same of a uint8 tensor.
const uint8_t* bytes_of(const at::Tensor& t);
uint8_t* mutable_bytes_of(const at::Tensor& t);

// The stream that PyTorch works on, on the device of `t`. Throws in a library built without CUDA, and throws what an earlier op
// found on the device (subbyte/base/value_watch.h).
Stream stream_of(const at::Tensor& t);

// `bytes` bytes on the device of `anchor`; undefined when 0. PyTorch's allocators align to 64 bytes or more.
at::Tensor workspace_of(int64_t bytes, const at::Tensor& anchor);

}  // namespace subbyte
