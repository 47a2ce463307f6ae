#include "subbyte_torch/ops/quantized_product.h"

#include <ATen/ops/empty.h>

#if SB_CUDA
#include "subbyte/ops/quantized_matmul/quantized_matmul_cuda.h"
#endif

namespace subbyte {

void run_quantized_product(const char* op, QuantizedMatmulParams p, const at::Tensor& x_step, const char* z_step_name,
                           const at::Tensor& z_step, const at::Tensor& anchor) {
  check_device(op, "x_step", x_step, "x", anchor);
  check_device(op, z_step_name, z_step, "x", anchor);
  const at::Tensor sx = x_step.to(at::kFloat).contiguous(), sz = z_step.to(at::kFloat).contiguous();
  p.x_step = static_cast<const float*>(data_of(sx));
  p.z_step = static_cast<const float*>(data_of(sz));
#if SB_CUDA
  if (anchor.is_cuda()) {
    p.workspace_bytes = cuda::quantized_matmul_workspace_bytes(p);
    const at::Tensor workspace = workspace_of(p.workspace_bytes, anchor);
    p.workspace = mutable_data_of(workspace);
    translated([&] { cuda::quantized_matmul(p, stream_of(anchor)); });
    return;
  }
#endif
  p.workspace_bytes = quantized_matmul_workspace_bytes(p);
  const at::Tensor workspace = workspace_of(p.workspace_bytes, anchor);
  p.workspace = mutable_data_of(workspace);
  translated([&] { quantized_matmul(p); });
}

void WeightRows::set(QuantizedMatmulParams& p, int64_t begin, int64_t count) const {
  p.n = count;
  p.z_batch_stride = 0;
  const int64_t row_bytes = rows.size(1) * rows.element_size();
  const uint8_t* at = static_cast<const uint8_t*>(data_of(rows));
  if (at != nullptr) at += begin * row_bytes;
  if (packed) {
    p.z_codes = at;
  } else {
    p.z = at;
    p.z_dtype = dtype;
    p.z_stride = p.k;
  }
}

WeightRows weight_rows_of(const char* op, const OptionalTensor& weight, const OptionalTensor& codes, const at::Tensor& x) {
  WeightRows w;
  w.packed = given(codes);
  const at::Tensor& t = w.packed ? *codes : *weight;
  check_device(op, w.packed ? "codes" : "weight", t, "x", x);
  if (!w.packed) w.dtype = dtype_of(op, "weight", t.scalar_type());
  w.rows = (t.dim() == 2 ? t : t.flatten(1)).contiguous();
  return w;
}

}  // namespace subbyte
