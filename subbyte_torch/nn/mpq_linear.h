// A packed linear layer that reads and writes the checkpoints of GPTQ, GBA ("MPQ") and EXL2 ("MBWQ") layers.
#pragma once
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>

#include <iosfwd>
#include <map>

#include "subbyte_torch/nn/packed_module.h"
#include "subbyte_torch/ops/mpq.h"

namespace subbyte::nn {

// What a layer's foreign checkpoint looks like:
//   kGba   MPQLinear with GBA quantization: groups by g_idx, scales (and float zeros) themselves quantized in the raw form
//   kGptq  GPTQ v1: integer zeros, plain scales; always asym
//   kMbwq  MBWQLinear of one width: rows in the order of q_perm
//   kExl2  MBWQLinear of mixed width: rows in the order of q_perm, groups of any lengths
enum class MPQLayout { kGba, kGptq, kMbwq, kExl2 };

struct MPQLinearOptions {
  MPQLinearOptions(int64_t in_features_, int64_t out_features_) : in_features(in_features_), out_features(out_features_) {}
  int64_t in_features, out_features;
  int bits = 4;             // 1 to 8; kExl2 learns its widths from what it loads
  std::string format;       // kExl2: a row layout such as "uint8*64+uint4*448"
  int64_t group_size = -1;  // -1: all in_features
  bool asym = false;        // W = scale (code - zero) with integer zeros; else W = scale code - zero
  MPQLayout layout = MPQLayout::kGba;
  int64_t dq_group_size = -1;  // output features that share a second-level scale; -1: all
  int dq_mode = 2;             // 1: each output feature has one for all groups
  bool bias = false;
  bool channel_scale = false;
  torch::ScalarType dtype = torch::kFloat;  // of scales and zeros: float32, float16 or bfloat16
};

// y = (x * channel_scale) W^T + bias. The packed weight is the only owner of codes, scales and zeros; the gradient arrives in
// grad(), dense [N, K], and accumulates. New layers hold rounded values of torch::nn::Linear's initialisation.
// Sizes, types and options that contradict each other throw c10::ValueError at construction.
class MPQLinearImpl : public PackedModule<MPQLinearImpl> {
 public:
  using State = torch::OrderedDict<std::string, torch::Tensor>;

  MPQLinearImpl(int64_t in_features, int64_t out_features) : MPQLinearImpl(MPQLinearOptions(in_features, out_features)) {}
  explicit MPQLinearImpl(const MPQLinearOptions& options);
  // Packs `weight` [N, K], rounded to nearest on the range of each group; perm int32 [K] or undefined: act-order.
  MPQLinearImpl(const MPQLinearOptions& options, const torch::Tensor& weight, torch::Tensor bias,
                const torch::Tensor& perm = {});

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  torch::Tensor forward(const torch::Tensor& x);
  void load(torch::serialize::InputArchive& archive) override;

  // The tensors of an original layer by key (no prefix): raw (qstatistic or qscales with their second level) or prepared
  // (scales, zeros). Converted to this layer's device and type. Throws c10::ValueError and leaves the layer as it was.
  void load_original(const State& state);
  // The original's state_dict of this layer. Lossless, except that the raw form of kGba with group_size < 256 quantizes scales
  // and float zeros again; blocks that hold what was loaded get back the bytes they had.
  State export_original(bool raw = false) const;
  // Groups of the file.
  int64_t groups() const { return groups_; }
  // int64 [G'] or undefined, see ops/mpq.h.
  const torch::Tensor& parent() const { return parent_; }

  MPQLinearOptions options;
  torch::Tensor bias, channel_scale;

 private:
  struct SecondLevel {
    torch::Tensor zeros, scales;
  };

  void check_options();
  std::string made_format() const;
  void pack(const torch::Tensor& dense, const torch::Tensor& perm);
  void adopt(const ops::ImportedWeight& imported);
  void place(const char* name, torch::Tensor* member, const torch::Tensor& value);
  std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> second_level(const torch::Tensor& values, int64_t levels,
                                                                       const std::string& what) const;

  torch::Tensor parent_;
  int64_t groups_ = 0;
  std::map<std::string, SecondLevel> kept_;  // as loaded; export returns to them where they are exact
};

class MPQLinear : public torch::nn::ModuleHolder<MPQLinearImpl> {
 public:
  using torch::nn::ModuleHolder<MPQLinearImpl>::ModuleHolder;
  using Impl [[maybe_unused]] = MPQLinearImpl;
  // Packs a float layer; the bias is copied. Sizes and bias of `options` are the layer's.
  static MPQLinear from_linear(const torch::nn::Linear& layer, MPQLinearOptions options, const torch::Tensor& perm = {});
};

}  // namespace subbyte::nn
