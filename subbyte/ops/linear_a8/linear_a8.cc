#include "subbyte/ops/linear_a8/linear_a8.h"

#include <cmath>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/linear_a8/kernels.h"

namespace subbyte {

#if defined(__x86_64__)
#define SB_KERNEL(file, isa, shape, max_m, vector_bytes, rows_of_weight, centers_bytes)  \
  namespace file {                                                                       \
  void prepare_##shape(const LinearA8Job& job, int64_t m_begin, int64_t m_end) noexcept; \
  void run_##shape(const LinearA8Job& job, int64_t n_begin, int64_t n_end) noexcept;     \
  }
namespace linear_a8_x86 {
#include "subbyte/ops/linear_a8/kernels.inc"
}
#undef SB_KERNEL
#endif

namespace {

using Shape = LinearA8Kernel::Shape;
constexpr Shape shape_rowdot = Shape::kRowdot, shape_panel = Shape::kPanel;

constexpr LinearA8Kernel kKernels[] = {
#if defined(__x86_64__)
#define SB_KERNEL(file, isa, shape, max_m, vector_bytes, rows_of_weight, centers_bytes) \
  {"linear_a8_" #shape "_" #file,                                                       \
   isa,                                                                                 \
   shape_##shape,                                                                       \
   max_m,                                                                               \
   vector_bytes,                                                                        \
   rows_of_weight,                                                                      \
   centers_bytes,                                                                       \
   linear_a8_x86::file::prepare_##shape,                                                \
   linear_a8_x86::file::run_##shape},
#include "subbyte/ops/linear_a8/kernels.inc"
#undef SB_KERNEL
#endif
    {"linear_a8_reference", Isa::kScalar, Shape::kReference, INT64_MAX, 0, 1, false, nullptr, nullptr},
};

// |d| <= 127 * 128 * columns must stay below 2^31, and |e| <= 127 * columns below 2^24 to be exact as float32. Partial sums
// may pass 2^31: they wrap, and wrap back.
constexpr int64_t kMaxGroupColumns = 131072;

// Lays the job out over a workspace that starts at `base` (null to measure) and returns the bytes it takes.
int64_t lay_out(const LinearA8Kernel& kernel, const LinearA8Params& p, uint8_t* base, LinearA8Job& job) {
  const PackedMatrix& w = p.w;
  const bool rowdot = kernel.shape == Shape::kRowdot;
  job.p = p;
  job.group_size = max_i64(1, min_i64(w.group_size, w.k));
  job.padded_group_size = round_up(job.group_size, 4);
  job.groups = w.groups();
  job.has_offset = w.zero_kind != ZeroKind::kFixed;
  int64_t blocks = 0, stream_bytes_of_row = 0;
  for (int i = 0; i < w.layout.segment_count; ++i) {
    const Segment& from = w.layout.segments[size_t(i)];
    if (from.k_count == 0) continue;
    LinearA8Segment& s = job.segments[job.segment_count++];
    s.bits = format_bits(from.format);
    s.middle = format_levels(from.format) / 2;
    s.fixed_zero = format_fixed_zero(from.format);
    s.k_begin = from.k_begin;
    s.k_count = from.k_count;
    s.byte_begin = from.byte_begin;
    s.byte_count = stream_bytes(from.k_count, s.bits);
    s.group_begin = s.k_begin / job.group_size;
    s.group_count = ceil_div(s.k_count, job.group_size);
    s.block_begin = blocks;
    s.x_begin_bytes = stream_bytes_of_row;
    job.has_offset = job.has_offset || float(s.middle) != s.fixed_zero;
    if (rowdot) {
      const int64_t n = ceil_div(s.byte_count, kernel.vector_bytes);
      blocks += n;
      stream_bytes_of_row += n * kernel.vector_bytes * (8 / s.bits);
    }
  }
  job.tile_rows = rowdot ? 1 : 4;
  job.tiles = ceil_div(p.m, job.tile_rows);
  job.group_stride = round_up(job.groups, 16) * job.tile_rows;
  job.column_stride = round_up(w.k, 64);
  job.x_stride_bytes = rowdot ? stream_bytes_of_row : job.groups * job.padded_group_size * 4;
  job.start_stride = rowdot ? blocks * kernel.vector_bytes / 4 : job.group_stride;
  int64_t used = 0;
  auto take = [&](int64_t bytes) {
    uint8_t* at = base != nullptr ? base + used : nullptr;
    used += round_up(bytes, 64);
    return at;
  };
  job.columns = reinterpret_cast<int8_t*>(take(p.m * job.column_stride));
  job.x = reinterpret_cast<int8_t*>(take(job.tiles * job.x_stride_bytes));
  job.starts = reinterpret_cast<int32_t*>(take(job.tiles * job.start_stride * 4));
  job.sums = reinterpret_cast<float*>(take(job.tiles * job.group_stride * 4));
  job.group_scales = reinterpret_cast<float*>(take(job.tiles * job.group_stride * 4));
  job.row_scales = reinterpret_cast<float*>(take(p.m * 4));
  return used;
}

}  // namespace

std::span<const LinearA8Kernel> linear_a8_kernels() { return kKernels; }

bool serves(const LinearA8Kernel& kernel, const RowLayout& layout, int64_t group_size) {
  if (kernel.shape == Shape::kReference) return true;
  if (min_i64(group_size, layout.k) > kMaxGroupColumns) return false;
  if (kernel.shape == Shape::kPanel) return true;
  for (int i = 0; i < layout.segment_count; ++i) {
    const int bits = format_bits(layout.segments[size_t(i)].format);
    if (8 % bits != 0) return false;
    if (group_size >= layout.k) continue;  // one group: any length
    // Whole blocks a group, or groups that are whole 32-bit lanes of one block.
    const int64_t block_columns = int64_t(kernel.vector_bytes) * 8 / bits;
    const bool blocks = group_size % block_columns == 0;
    const bool lanes = block_columns % group_size == 0 && group_size * bits % 32 == 0;
    if (!blocks && !lanes) return false;
  }
  return true;
}

const LinearA8Kernel& select_linear_a8_kernel(int64_t m, const RowLayout& layout, int64_t group_size, Isa isa) {
  for (const LinearA8Kernel& k : kKernels)
    if (k.isa <= isa && m <= k.max_m && serves(k, layout, group_size)) return k;
  return kKernels[std::size(kKernels) - 1];
}

bool check_sizes(const LinearA8Params& p) {
  validate(p.w, "linear_a8");
  check_arg(p.dtype != DType::kF64, "linear_a8: x is float64, expected float32, float16 or bfloat16");
  check_arg(p.m >= 0, "linear_a8: x has ", p.m, " rows, expected at least 0");
  check_arg(p.m <= 1 || p.x_stride >= p.w.k, "linear_a8: row stride of x ", p.x_stride, " is below K = ", p.w.k);
  check_arg(p.m <= 1 || p.y_stride >= p.w.n, "linear_a8: row stride of y ", p.y_stride, " is below N = ", p.w.n);
  if (p.m == 0 || p.w.n == 0) return false;
  check_arg(p.y != nullptr && (p.x != nullptr || p.w.k == 0), "linear_a8: x or y are missing");
  return true;
}

int64_t linear_a8_workspace_bytes(const LinearA8Kernel& kernel, const LinearA8Params& p) {
  if (kernel.shape == Shape::kReference || p.m <= 0 || p.w.n <= 0) return 0;
  LinearA8Job job;
  return lay_out(kernel, p, nullptr, job);
}

int64_t linear_a8_workspace_bytes(const LinearA8Params& p) {
  return linear_a8_workspace_bytes(select_linear_a8_kernel(p.m, p.w.layout, p.w.group_size, active_isa()), p);
}

void linear_a8(const LinearA8Kernel& kernel, const LinearA8Params& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "linear_a8");
  if (kernel.shape == Shape::kReference) return reference::linear_a8(p);
  LinearA8Job job;
  const int64_t bytes = lay_out(kernel, p, static_cast<uint8_t*>(p.workspace), job);
  check_arg(p.workspace != nullptr && p.workspace_bytes >= bytes, "linear_a8: the workspace has ",
            p.workspace != nullptr ? p.workspace_bytes : 0, " bytes, expected linear_a8_workspace_bytes() = ", bytes);
  check_arg(reinterpret_cast<uintptr_t>(p.workspace) % 64 == 0, "linear_a8: the workspace is not 64-byte aligned");
  parallel_for(job.tiles, 1, [&](int64_t begin, int64_t end) {
    kernel.prepare(job, begin * job.tile_rows, min_i64(end * job.tile_rows, p.m));
  });
  parallel_for(p.w.n, kernel.rows_of_weight, [&](int64_t begin, int64_t end) { kernel.run(job, begin, end); });
}

void linear_a8(const LinearA8Params& p) {
  linear_a8(select_linear_a8_kernel(p.m, p.w.layout, p.w.group_size, active_isa()), p);
}

}  // namespace subbyte
