#include "subbyte_torch/convert.h"

#include <ATen/ops/empty.h>
#if SB_CUDA
#include <c10/cuda/CUDAStream.h>

#include "subbyte/base/value_watch.h"
#endif

namespace subbyte {

RowLayout layout_of(const char* op, std::string_view format, int64_t k) {
  try {
    return row_layout(format, k);
  } catch (const std::invalid_argument& e) {
    TORCH_CHECK_VALUE(false, op, ": ", e.what());
  }
}

DType dtype_of(const char* op, const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat: return DType::kF32;
    case at::kHalf: return DType::kF16;
    case at::kBFloat16: return DType::kBF16;
    case at::kDouble: return DType::kF64;
    default: TORCH_CHECK_VALUE(false, op, ": ", name, " is ", type, ", expected float32, float16, bfloat16 or float64");
  }
}

at::ScalarType scalar_type_of(DType type) {
  switch (type) {
    case DType::kF32: return at::kFloat;
    case DType::kF16: return at::kHalf;
    case DType::kBF16: return at::kBFloat16;
    default: return at::kDouble;
  }
}

void check_device(const char* op, const char* name, const at::Tensor& t, const char* anchor_name, const at::Tensor& anchor) {
  TORCH_CHECK_VALUE(t.device() == anchor.device(), op, ": ", name, " is on ", t.device(), ", ", anchor_name, " is on ",
                    anchor.device());
}

Rows rows_of(const char* op, const char* name, const at::Tensor& x) {
  Rows out;
  out.dtype = dtype_of(op, name, x.scalar_type());
  const int64_t k = x.size(-1);
  out.m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) out.m *= x.size(i);
  out.tensor = x.dim() == 2 ? x : x.reshape({out.m, k});
  const bool by_stride = (k <= 1 || out.tensor.stride(1) == 1) && (out.m <= 1 || out.tensor.stride(0) >= k);
  // A conjugate or negative view holds other numbers than it means.
  if (!by_stride || out.tensor.is_neg()) out.tensor = out.tensor.resolve_neg().contiguous();
  out.stride = out.m <= 1 ? k : out.tensor.stride(0);
  return out;
}

PackedView affine_view_of(const char* op, int64_t n, int64_t k, const at::Tensor& scales, const OptionalTensor& zeros,
                          const OptionalTensor& offsets, const OptionalTensor& perm, std::string_view format,
                          int64_t group_size, const char* anchor_name, const at::Tensor& anchor) {
  PackedView v;
  PackedMatrix& m = v.matrix;
  m.layout = layout_of(op, format, k);
  m.n = n;
  m.k = k;
  m.group_size = group_size;
  check_device(op, "scales", scales, anchor_name, anchor);
  v.scales = scales.contiguous();
  m.scales = v.scales.const_data_ptr();
  m.scale_dtype = dtype_of(op, "scales", scales.scalar_type());
  if (given(zeros) || given(offsets)) {
    const at::Tensor& z = given(zeros) ? *zeros : *offsets;
    m.zero_kind = given(zeros) ? ZeroKind::kZeros : ZeroKind::kOffsets;
    check_device(op, given(zeros) ? "zeros" : "offsets", z, anchor_name, anchor);
    v.zeros = z.contiguous();
    m.zeros = v.zeros.const_data_ptr();
    m.zero_dtype = dtype_of(op, "zeros", z.scalar_type());
  }
  if (given(perm)) {
    check_device(op, "perm", *perm, anchor_name, anchor);
    v.perm = perm->contiguous();
    m.perm = v.perm.const_data_ptr<int32_t>();
  }
  return v;
}

PackedView view_of(const char* op, const PackedArgs& w, const char* anchor_name, const at::Tensor& anchor) {
  check_device(op, "codes", w.codes, anchor_name, anchor);
  PackedView v = affine_view_of(op, w.codes.size(0), w.in_features, w.scales, w.zeros, w.offsets, w.perm, w.format,
                                w.group_size, anchor_name, anchor);
  v.codes = w.codes.contiguous();
  v.matrix.codes = v.codes.const_data_ptr<uint8_t>();
  return v;
}

at::Tensor bias_of(const char* op, const OptionalTensor& bias, const char* anchor_name, const at::Tensor& anchor) {
  if (!given(bias)) return {};
  check_device(op, "bias", *bias, anchor_name, anchor);
  return bias->contiguous();
}

const void* data_of(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
const uint8_t* bytes_of(const at::Tensor& t) { return t.const_data_ptr<uint8_t>(); }
uint8_t* mutable_bytes_of(const at::Tensor& t) { return t.mutable_data_ptr<uint8_t>(); }
void* mutable_data_of(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

Stream stream_of(const at::Tensor& t) {
#if SB_CUDA
  translated([] { cuda::throw_watched(); });
  return Stream{c10::cuda::getCurrentCUDAStream(t.device().index()).stream()};
#else
  TORCH_CHECK(false, "subbyte was built without CUDA, a tensor is on ", t.device());
#endif
}

at::Tensor workspace_of(int64_t bytes, const at::Tensor& anchor) {
  return bytes > 0 ? at::empty({bytes}, anchor.options().dtype(at::kByte)) : at::Tensor();
}

}  // namespace subbyte
