#include "subbyte_torch/optim/galore.h"

#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <array>
#include <utility>

namespace subbyte::optim {

GaLoreProjector::GaLoreProjector(GaLoreOptions options) : options_(std::move(options)) {
  constexpr std::array kTypes = {"std", "reverse_std", "right", "left", "full"};
  TORCH_CHECK_VALUE(options_.rank >= 1, "GaLoreProjector: rank is ", options_.rank, ", expected at least 1");
  TORCH_CHECK_VALUE(options_.update_proj_gap >= 1, "GaLoreProjector: update_proj_gap is ", options_.update_proj_gap,
                    ", expected at least 1");
  TORCH_CHECK_VALUE(std::find(kTypes.begin(), kTypes.end(), options_.proj_type) != kTypes.end(),
                    "GaLoreProjector: proj_type is '", options_.proj_type, "', expected std, reverse_std, right, left or full");
}

void GaLoreProjector::set_basis(torch::Tensor left, torch::Tensor right) {
  left_ = std::move(left);
  right_ = std::move(right);
}

torch::Tensor GaLoreProjector::project(const torch::Tensor& gradient, int64_t iteration) {
  TORCH_CHECK_VALUE(gradient.dim() == 2, "GaLoreProjector: the gradient has ", gradient.dim(),
                    " dimensions, expected a matrix");
  const torch::NoGradGuard no_grad;
  if ((!left_.defined() && !right_.defined()) || iteration % options_.update_proj_gap == 0) {
    const std::string& type = options_.proj_type;
    const bool tall = gradient.size(0) >= gradient.size(1);
    const bool use_right = type == "right" || type == "full" || (type == "std" && tall) || (type == "reverse_std" && !tall);
    const bool use_left = type == "full" || !use_right;
    const auto [u, s, vh] = at::linalg_svd(gradient.to(torch::kFloat), /*full_matrices=*/false);
    left_ = use_left ? u.slice(1, 0, options_.rank).to(gradient.scalar_type()).contiguous() : torch::Tensor();
    right_ = use_right ? vh.slice(0, 0, options_.rank).to(gradient.scalar_type()).contiguous() : torch::Tensor();
  }
  torch::Tensor r = gradient;
  if (left_.defined()) r = at::matmul(left_.t(), r);
  if (right_.defined()) r = at::matmul(r, right_.t());
  return r;
}

torch::Tensor GaLoreProjector::project_back(const torch::Tensor& projected) const {
  TORCH_CHECK_VALUE(left_.defined() || right_.defined(), "GaLoreProjector: project_back before project, there is no basis yet");
  torch::Tensor g = projected;
  if (left_.defined()) g = at::matmul(left_, g);
  if (right_.defined()) g = at::matmul(g, right_);
  return g * options_.scale;
}

}  // namespace subbyte::optim
