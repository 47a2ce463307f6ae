#include "subbyte/ops/linear/linear.h"

#include <algorithm>
#include <array>
#include <limits>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/linear/kernels.h"
#include "subbyte/ops/linear/tile_grid.h"

namespace subbyte {
namespace {

constexpr LinearKernel kTable[] = {
#define SB_LINEAR_KERNEL(name, isa, form, lanes, row_step, tile_rows, max_m) \
  {#name, Isa::isa, LinearForm::form, lanes, row_step, tile_rows, max_m, name##_prepare, name##_multiply},
#include "subbyte/ops/linear/kernels.inc"
#undef SB_LINEAR_KERNEL
    {"linear_reference", Isa::kScalar, LinearForm::kReference, 1, 1, 1, std::numeric_limits<int64_t>::max(), nullptr, nullptr},
};

// Rows of x up to which codes of fewer than 4 bits are streamed; max_m of the table holds for the wider ones. Decoding a narrow
// panel costs little beside it: 1 bit, N = K = 4096, four rows streamed against eight rows through tiles took 936 and 397 us
// (AVX-512, 16 threads), 6.2 and 4.7 ms (AVX2, one); 8 bits 310 and 459 us.
constexpr int64_t kNarrowRows = 2;
// Work below which a second thread costs more than it saves, in multiply-adds.
constexpr int64_t kMinChunkWork = 1 << 17;

// float32 to float16 or bfloat16.
void round_floats(const float* from, DType t, int64_t count, uint16_t* to) {
  if (t == DType::kBF16) {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_f16(from[i]);
  }
}

int64_t padded(int64_t floats) { return round_up(floats, 16); }  // 64-byte steps

// Everything that follows from the shapes: kernels and where things lie in the workspace, in floats.
struct Plan {
  bool reference = false;
  std::array<const LinearKernel*, RowLayout::kMaxSegments> kernel{};
  std::array<int64_t, RowLayout::kMaxSegments> x{}, sums{}, sums_stride{}, lane_groups{};  // -1: not there
  int64_t out = -1, bias = -1, floats = 0;
};

Plan make_plan(const LinearParams& p, Isa isa) {
  Plan plan;
  const auto take = [&plan](int64_t floats) {
    const int64_t at = plan.floats;
    plan.floats += padded(floats);
    return at;
  };
  plan.reference = p.dtype == DType::kF64 || p.w.k == 0 || p.m <= 0 || p.w.n <= 0;
  for (int i = 0; i < p.w.layout.segment_count && !plan.reference; ++i) {
    const Segment& s = p.w.layout.segments[i];
    const LinearKernel& kernel = select_linear_kernel(p.m, s.format, p.w.group_size, s.k_count, p.dtype, isa);
    plan.kernel[i] = &kernel;
    plan.reference = kernel.form == LinearForm::kReference;
  }
  if (plan.reference) return plan;
  for (int i = 0; i < p.w.layout.segment_count; ++i) {
    const Segment& s = p.w.layout.segments[i];
    const LinearKernel& kernel = *plan.kernel[i];
    plan.sums[i] = plan.lane_groups[i] = -1;
    if (kernel.form == LinearForm::kTile) {
      plan.x[i] = take(p.m * s.k_count);
      continue;
    }
    const int64_t block = int64_t(kernel.lanes) * lane_codes(format_bits(s.format)), k = round_up(s.k_count, block);
    const int64_t groups = ceil_div(s.k_count, p.w.group_size);
    plan.x[i] = take(p.m * k);
    if (p.w.zero_kind != ZeroKind::kFixed || format_fixed_zero(s.format) != float(format_centre(s.format))) {
      plan.sums_stride[i] = padded(groups);
      plan.sums[i] = take(p.m * plan.sums_stride[i]);
    }
    if (groups > 1 && p.w.group_size % block != 0) plan.lane_groups[i] = take(k / lane_codes(format_bits(s.format)));
  }
  if (p.dtype != DType::kF32) {
    plan.out = take(p.m * p.w.n);
    if (p.bias != nullptr) plan.bias = take(p.w.n);
  }
  return plan;
}

}  // namespace

std::span<const LinearKernel> linear_kernels() { return kTable; }

bool linear_kernel_serves(const LinearKernel& kernel, Format format, int64_t group_size, int64_t k, DType dtype) {
  if (kernel.form == LinearForm::kReference) return true;
  if (dtype == DType::kF64) return false;
  return kernel.form == LinearForm::kTile || group_size >= k || group_size % lane_codes(format_bits(format)) == 0;
}

const LinearKernel& select_linear_kernel(int64_t m, Format format, int64_t group_size, int64_t k, DType dtype, Isa isa) {
  for (const LinearKernel& kernel : kTable) {
    if (kernel.isa > isa || m > kernel.max_m || !linear_kernel_serves(kernel, format, group_size, k, dtype)) continue;
    if (kernel.form == LinearForm::kRows && format_bits(format) < 4 && m > kNarrowRows) continue;
    return kernel;
  }
  return kTable[std::size(kTable) - 1];
}

int64_t linear_workspace_bytes(const LinearParams& p) { return make_plan(p, active_isa()).floats * 4; }

bool check_sizes(const LinearParams& p) {
  validate(p.w, "linear");
  check_arg(p.m >= 0, "linear: x has ", p.m, " rows, expected at least 0");
  check_arg(p.m <= 1 || p.x_stride >= p.w.k, "linear: row stride of x ", p.x_stride, " is below K = ", p.w.k);
  check_arg(p.m <= 1 || p.y_stride >= p.w.n, "linear: row stride of y ", p.y_stride, " is below N = ", p.w.n);
  if (p.m == 0 || p.w.n == 0) return false;
  check_arg(p.y != nullptr && (p.x != nullptr || p.w.k == 0), "linear: x or y are missing");
  return true;
}

void linear(const LinearParams& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "linear");
  const Plan plan = make_plan(p, active_isa());
  if (plan.reference) {
    const int64_t grain = max_i64(1, kMinChunkWork / 64 / max_i64(1, p.m * p.w.k));
    parallel_for(p.w.n, grain, [&](int64_t begin, int64_t end) { reference::linear_rows(p, begin, end); });
    return;
  }
  check_arg(p.workspace_bytes >= plan.floats * 4 && p.workspace != nullptr, "linear: the workspace has ", p.workspace_bytes,
            " bytes, expected linear_workspace_bytes() = ", plan.floats * 4);

  float* const workspace = static_cast<float*>(p.workspace);
  const int segments = p.w.layout.segment_count;
  std::array<WeightSegment, RowLayout::kMaxSegments> weights;
  std::array<LinearInput, RowLayout::kMaxSegments> inputs;
  int64_t row_step = 1, tile_rows = p.m;
  for (int i = 0; i < segments; ++i) {
    weights[i] = weight_segment(p.w, i);
    LinearInput& in = inputs[i];
    in.x = p.x;
    in.dtype = p.dtype;
    in.m = p.m;
    in.x_stride = p.x_stride;
    in.perm = p.w.perm;
    in.prepared = workspace + plan.x[i];
    if (plan.sums[i] >= 0) in.sums = workspace + plan.sums[i];
    in.sums_stride = plan.sums_stride[i];
    if (plan.lane_groups[i] >= 0) in.lane_groups = reinterpret_cast<int32_t*>(workspace + plan.lane_groups[i]);
    row_step = max_i64(row_step, plan.kernel[i]->row_step);
    // Segments with few rows of x are served by either form; then all rows are one tile.
    if (plan.kernel[i]->form == LinearForm::kTile) tile_rows = plan.kernel[i]->tile_rows;
  }
  parallel_for(p.m, max_i64(1, kMinChunkWork / p.w.k), [&](int64_t begin, int64_t end) {
    for (int i = 0; i < segments; ++i) plan.kernel[i]->prepare(weights[i], inputs[i], begin, end);
  });

  LinearOutput out;
  const bool rounds = p.dtype != DType::kF32;
  out.out = rounds ? workspace + plan.out : static_cast<float*>(p.y);
  out.stride = rounds ? p.w.n : p.y_stride;
  const float* bias = static_cast<const float*>(p.bias);
  if (rounds && p.bias != nullptr) {
    float* copy = workspace + plan.bias;
    for (int64_t n = 0; n < p.w.n; ++n) copy[n] = load_float(p.bias, p.dtype, n);
    bias = copy;
  }
  const TileGrid grid = TileGrid::make(p.m, tile_rows, ceil_div(p.w.n, row_step));
  const int64_t unit_work = max_i64(1, row_step * p.m * p.w.k / grid.parts);
  parallel_for(grid.units(), max_i64(1, kMinChunkWork / unit_work), [&](int64_t begin, int64_t end) {
    grid.rectangles(begin, end, [&](int64_t strip_begin, int64_t strip_end, int64_t m_begin, int64_t m_end) {
      const int64_t n_begin = strip_begin * row_step, n_end = min_i64(strip_end * row_step, p.w.n);
      for (int i = 0; i < segments; ++i) {
        LinearOutput o = out;
        o.accumulate = i > 0;
        o.bias = i + 1 == segments ? bias : nullptr;
        o.m_begin = m_begin;
        o.m_end = m_end;
        plan.kernel[i]->multiply(weights[i], inputs[i], o, n_begin, n_end);
      }
      for (int64_t m = m_begin; m < m_end && rounds; ++m)
        round_floats(out.out + m * out.stride + n_begin, p.dtype, n_end - n_begin,
                     static_cast<uint16_t*>(p.y) + m * p.y_stride + n_begin);
    });
  });
}

}  // namespace subbyte
