#include "subbyte_torch/ops/batched_rows.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>

namespace subbyte {

at::Tensor batched_product_shape(const char* op, const at::Tensor& x, const at::Tensor& z) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && z.dim() >= 2, op, ": x has ", x.dim(), " and z ", z.dim(),
                    " dimensions, expected at least 2");
  TORCH_CHECK_VALUE(x.scalar_type() == z.scalar_type(), op, ": x is ", x.scalar_type(), ", z is ", z.scalar_type(),
                    ", expected one dtype");
  dtype_of(op, "x", x.scalar_type());
  TORCH_CHECK_VALUE(x.sym_size(-1) == z.sym_size(-1), op, ": x has ", x.sym_size(-1), " columns, z has ", z.sym_size(-1),
                    ", expected the same K");
  const auto lead = [](const at::Tensor& t) { return t.sym_sizes().slice(0, size_t(t.dim() - 2)); };
  c10::SymDimVector sizes;
  try {
    sizes = at::infer_size_symdimvector(lead(x), lead(z));
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(false, op, ": leading dimensions ", lead(x), " of x and ", lead(z), " of z do not broadcast");
  }
  sizes.push_back(x.sym_size(-2));
  sizes.push_back(z.sym_size(-2));
  return at::empty_symint(sizes, x.options().requires_grad(std::nullopt));
}

BatchedRows batched_rows_of(const char* op, const char* name, const at::Tensor& v, const at::Tensor& y) {
  BatchedRows out;
  out.dtype = dtype_of(op, name, v.scalar_type());
  for (int64_t d = 0; d < y.dim() - 2; ++d) out.batch *= y.size(d);
  int64_t own = 1;
  for (int64_t d = 0; d < v.dim() - 2; ++d) own *= v.size(d);
  if (own == 1) {
    out.tensor = v.reshape({v.size(-2), v.size(-1)}).resolve_neg().contiguous();
    return out;
  }
  auto sizes = y.sizes().slice(0, size_t(y.dim() - 2)).vec();
  sizes.push_back(v.size(-2));
  sizes.push_back(v.size(-1));
  out.tensor = v.expand(sizes).resolve_neg().contiguous();
  out.batch_stride = v.size(-2) * v.size(-1);
  return out;
}

}  // namespace subbyte
