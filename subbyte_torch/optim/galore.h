// Low-rank projection of gradients (Zhao et al., "GaLore", 2024).
//
// Projects a gradient matrix G [rows, cols] onto singular vectors of an earlier gradient, and back: P holds the first `rank`
// right singular vectors as rows, U the left ones as columns, found in float32 and cast to G's type.
//   right  R = G P^T, back R P;    left  R = U^T G, back U R;    full  R = U^T G P^T, back U R P
//   "std": right where rows >= cols, else left;  "reverse_std": the other way round;  "right", "left", "full": always that
// The side is chosen when the basis is formed and kept with it. Moments gathered in the old basis are not turned into the new
// one at a refresh. A rank above the smaller side uses what there is.
#pragma once
#include <torch/types.h>

#include <cstdint>
#include <string>

namespace subbyte::optim {

struct GaLoreOptions {
  int64_t rank = 0;  // 0: no projection, where an optimizer may have one
  int64_t update_proj_gap = 200;
  double scale = 1.0;
  std::string proj_type = "std";
};

class GaLoreProjector {
 public:
  // Throws c10::ValueError for a rank or gap below 1 and an unknown type.
  explicit GaLoreProjector(GaLoreOptions options);

  // R of G. The basis is formed anew from G when there is none and when `iteration`, the steps before this one, is a multiple
  // of the gap. Throws c10::ValueError unless G is a matrix.
  torch::Tensor project(const torch::Tensor& gradient, int64_t iteration);
  // options().scale times the matrix that R stands for.
  torch::Tensor project_back(const torch::Tensor& projected) const;

  const GaLoreOptions& options() const { return options_; }
  // The basis; undefined where the side has no such part, and before the first project.
  const torch::Tensor& left() const { return left_; }    // U [rows, r]
  const torch::Tensor& right() const { return right_; }  // P [r, cols]
  void set_basis(torch::Tensor left, torch::Tensor right);

 private:
  GaLoreOptions options_;
  torch::Tensor left_, right_;
};

}  // namespace subbyte::optim
