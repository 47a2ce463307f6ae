#include "subbyte/ops/linear_grad_input/linear_grad_input.h"

#include <array>
#include <limits>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/ops/linear/tile_grid.h"
#include "subbyte/ops/linear_grad_input/kernels.h"

namespace subbyte {
namespace {

constexpr GradInputKernel kTable[] = {
#define SB_GRAD_INPUT_KERNEL(name, isa, form, lanes, tile_rows, max_m) \
  {#name, Isa::isa, GradInputForm::form, lanes, tile_rows, max_m, name##_prepare, name##_multiply},
#include "subbyte/ops/linear_grad_input/kernels.inc"
#undef SB_GRAD_INPUT_KERNEL
    {"linear_grad_input_reference", Isa::kScalar, GradInputForm::kReference, 1, 1, std::numeric_limits<int64_t>::max(), nullptr,
     nullptr},
};

// Work below which a second thread costs more than it saves, in multiply-adds.
constexpr int64_t kMinChunkWork = 1 << 17;
// Columns of a unit of the rows kernel over all rows of gy: its sums take a quarter to half of L1.
constexpr int64_t kSpanColumns = 4096;

int64_t padded(int64_t floats) { return round_up(floats, 16); }  // 64-byte steps

struct SegmentPlan {
  const GradInputKernel* kernel = nullptr;
  int64_t block = 0, blocks = 0, fields = 0;  // codes of a block, blocks of the segment, codes of a lane
  int64_t chunks = 0, span_blocks = 0, spans = 0, group_stride = 0;
  int64_t units = 0;
  TileGrid grid;
  int64_t group_map = -1, sums = -1, group_sums = -1;  // places in the workspace in floats, -1: not there
};

struct Plan {
  bool reference = false;
  std::array<SegmentPlan, RowLayout::kMaxSegments> segment{};
  int64_t gy_tiles = -1, gy_float = -1, floats = 0;
};

Plan make_plan(const LinearGradInputParams& p, Isa isa) {
  Plan plan;
  const auto take = [&plan](int64_t floats) {
    const int64_t at = plan.floats;
    plan.floats += padded(floats);
    return at;
  };
  plan.reference = p.dtype == DType::kF64 || p.w.k <= 0 || p.w.n <= 0 || p.m <= 0;
  for (int i = 0; i < p.w.layout.segment_count && !plan.reference; ++i) {
    const Segment& s = p.w.layout.segments[i];
    plan.segment[i].kernel = &select_linear_grad_input_kernel(p.m, s.format, p.w.group_size, s.k_count, p.dtype, isa);
    plan.reference = plan.segment[i].kernel->form == GradInputForm::kReference;
  }
  if (plan.reference) return plan;
  for (int i = 0; i < p.w.layout.segment_count; ++i) {
    const Segment& s = p.w.layout.segments[i];
    SegmentPlan& q = plan.segment[i];
    q.fields = lane_codes(format_bits(s.format));
    q.block = q.kernel->lanes * q.fields;
    q.blocks = ceil_div(s.k_count, q.block);
    if (q.kernel->form == GradInputForm::kTile) {
      q.grid = TileGrid::make(p.m, q.kernel->tile_rows, ceil_div(s.k_count, 2 * q.kernel->lanes));
      if (p.dtype != DType::kF32 || p.w.perm != nullptr) q.sums = take(p.m * s.k_count);
      if (plan.gy_tiles < 0) plan.gy_tiles = take(p.m * p.w.n);
      continue;
    }
    if (s.k_count > p.w.group_size && p.w.group_size % q.block != 0) q.group_map = take(q.blocks * q.block);
    q.chunks = ceil_div(p.w.n, kGradInputChunk);
    q.span_blocks = max_i64(1, kSpanColumns / (p.m * q.block));
    q.spans = ceil_div(q.blocks, q.span_blocks);
    q.units = q.chunks * q.spans;
    q.sums = take(q.chunks * p.m * q.blocks * q.block);
    if (p.w.zero_kind != ZeroKind::kFixed || format_fixed_zero(s.format) != float(format_centre(s.format))) {
      q.group_stride = padded(ceil_div(q.span_blocks * q.block, p.w.group_size) + 1 + q.kernel->lanes);
      q.group_sums = take(q.units * p.m * q.group_stride);
    }
    if (p.dtype != DType::kF32 && plan.gy_float < 0) plan.gy_float = take(p.m * p.w.n);
  }
  return plan;
}

// The group of every column of the segment in the order of the fields, counted from the first group of its block.
void fill_group_map(const SegmentPlan& q, const WeightSegment& w, int64_t lanes, int32_t* map) {
  for (int64_t b = 0; b < q.blocks; ++b) {
    const int64_t first = b * q.block / w.group_size;
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t j = 0; j < q.fields; ++j) {
        const int64_t g = min_i64((b * q.block + lane * q.fields + j) / w.group_size, w.groups - 1);
        map[b * q.block + j * lanes + lane] = int32_t(g - first);
      }
  }
}

// gx[m, column of stored k ... k + count) = from, rounded.
void store_columns(const LinearGradInputParams& p, int64_t m, int64_t k, int64_t count, const float* from) {
  const int64_t at = m * p.gx_stride;
  if (p.w.perm != nullptr) {
    for (int64_t j = 0; j < count; ++j) store_float(p.gx, p.dtype, at + p.w.perm[k + j], from[j]);
  } else if (p.dtype == DType::kF32) {
    for (int64_t j = 0; j < count; ++j) static_cast<float*>(p.gx)[at + k + j] = from[j];
  } else {
    for (int64_t j = 0; j < count; ++j) store_float(p.gx, p.dtype, at + k + j, from[j]);
  }
}

// One segment by its tile kernel: into gx where that is float32 in stored order, else through the workspace.
void multiply_tiles(const LinearGradInputParams& p, const SegmentPlan& q, const GradInputTask& segment) {
  const bool direct = segment.sums == nullptr;
  const int64_t strip = 2 * q.kernel->lanes, k_count = segment.w.k;
  const int64_t unit_work = max_i64(1, strip * p.m * p.w.n / q.grid.parts);
  parallel_for(q.grid.units(), max_i64(1, kMinChunkWork / unit_work), [&](int64_t begin, int64_t end) {
    q.grid.rectangles(begin, end, [&](int64_t strip_begin, int64_t strip_end, int64_t m_begin, int64_t m_end) {
      GradInputTask task = segment;
      task.out = direct ? static_cast<float*>(p.gx) + task.w.k_begin : task.sums;
      task.out_stride = direct ? p.gx_stride : k_count;
      task.m_begin = m_begin;
      task.m_end = m_end;
      q.kernel->multiply(task, strip_begin, strip_end);
      const int64_t k = strip_begin * strip, count = min_i64(strip_end * strip, k_count) - k;
      for (int64_t m = m_begin; m < m_end && !direct; ++m)
        store_columns(p, m, task.w.k_begin + k, count, task.sums + m * k_count + k);
    });
  });
}

}  // namespace

std::span<const GradInputKernel> linear_grad_input_kernels() { return kTable; }

bool linear_grad_input_kernel_serves(const GradInputKernel& kernel, Format format, int64_t group_size, int64_t k, DType dtype) {
  if (kernel.form == GradInputForm::kReference) return true;
  if (dtype == DType::kF64) return false;
  return kernel.form == GradInputForm::kTile || group_size >= k || group_size % lane_codes(format_bits(format)) == 0;
}

const GradInputKernel& select_linear_grad_input_kernel(int64_t m, Format format, int64_t group_size, int64_t k, DType dtype,
                                                       Isa isa) {
  for (const GradInputKernel& kernel : kTable)
    if (kernel.isa <= isa && m <= kernel.max_m && linear_grad_input_kernel_serves(kernel, format, group_size, k, dtype))
      return kernel;
  return kTable[std::size(kTable) - 1];
}

int64_t linear_grad_input_workspace_bytes(const LinearGradInputParams& p) { return make_plan(p, active_isa()).floats * 4; }

bool check_sizes(const LinearGradInputParams& p) {
  validate(p.w, "linear_grad_input");
  check_arg(p.m >= 0, "linear_grad_input: gy has ", p.m, " rows, expected at least 0");
  check_arg(p.m <= 1 || p.gy_stride >= p.w.n, "linear_grad_input: row stride of gy ", p.gy_stride, " is below N = ", p.w.n);
  check_arg(p.m <= 1 || p.gx_stride >= p.w.k, "linear_grad_input: row stride of gx ", p.gx_stride, " is below K = ", p.w.k);
  if (p.m == 0 || p.w.k == 0) return false;
  check_arg(p.gx != nullptr && (p.gy != nullptr || p.w.n == 0), "linear_grad_input: gy or gx are missing");
  return true;
}

void linear_grad_input(const LinearGradInputParams& p) {
  if (!check_sizes(p)) return;
  validate_perm(p.w, "linear_grad_input");
  const Plan plan = make_plan(p, active_isa());
  if (plan.reference) {
    const int64_t grain = max_i64(1, kMinChunkWork / 64 / max_i64(1, p.m * p.w.n));
    parallel_for(p.w.k, grain, [&](int64_t begin, int64_t end) { reference::linear_grad_input_columns(p, begin, end); });
    return;
  }
  check_arg(p.workspace_bytes >= plan.floats * 4 && p.workspace != nullptr, "linear_grad_input: the workspace has ",
            p.workspace_bytes, " bytes, expected linear_grad_input_workspace_bytes() = ", plan.floats * 4);

  float* const workspace = static_cast<float*>(p.workspace);
  bool tiles_ready = false, floats_ready = false;
  for (int i = 0; i < p.w.layout.segment_count; ++i) {
    const SegmentPlan& q = plan.segment[i];
    GradInputTask task;
    task.w = weight_segment(p.w, i);
    task.gy = p.gy;
    task.dtype = p.dtype;
    task.m = p.m;
    task.gy_stride = p.gy_stride;
    task.k_padded = q.blocks * q.block;
    if (q.sums >= 0) task.sums = workspace + q.sums;
    task.span_blocks = q.span_blocks;
    task.group_stride = q.group_stride;
    if (q.group_sums >= 0) task.group_sums = workspace + q.group_sums;
    if (q.group_map >= 0) {
      task.group_map = reinterpret_cast<int32_t*>(workspace + q.group_map);
      fill_group_map(q, task.w, q.kernel->lanes, task.group_map);
    }
    const bool tile = q.kernel->form == GradInputForm::kTile;
    if (tile) {
      task.prepared = workspace + plan.gy_tiles;
    } else {
      task.prepared = p.dtype == DType::kF32 ? nullptr : workspace + plan.gy_float;
      task.gy_float = p.dtype == DType::kF32 ? static_cast<const float*>(p.gy) : task.prepared;
      task.gy_float_stride = p.dtype == DType::kF32 ? p.gy_stride : p.w.n;
    }
    bool& ready = tile ? tiles_ready : floats_ready;  // every segment reads the same gy
    if (!ready && task.prepared != nullptr)
      parallel_for(p.m, max_i64(1, kMinChunkWork / p.w.n),
                   [&](int64_t begin, int64_t end) { q.kernel->prepare(task, begin, end); });
    ready = true;
    if (tile) {
      multiply_tiles(p, q, task);
      continue;
    }
    const int64_t unit_work = max_i64(1, p.m * p.w.n * task.w.k / q.units);
    parallel_for(q.units, max_i64(1, kMinChunkWork / unit_work),
                 [&](int64_t begin, int64_t end) { q.kernel->multiply(task, begin, end); });
    // The chunks of weight rows in their order, rounded once.
    parallel_for(ceil_div(task.w.k, 256), max_i64(1, kMinChunkWork / 256 / (p.m * q.chunks)), [&](int64_t begin, int64_t end) {
      for (int64_t m = 0; m < p.m; ++m)
        for (int64_t k0 = begin * 256; k0 < min_i64(end * 256, task.w.k); k0 += 256) {
          const int64_t count = min_i64(256, task.w.k - k0);
          float sum[256];
          for (int64_t c = 0; c < q.chunks; ++c) {
            const float* from = task.sums + (c * p.m + m) * task.k_padded + k0;
            if (c == 0)
              for (int64_t j = 0; j < count; ++j) sum[j] = from[j];
            else
              for (int64_t j = 0; j < count; ++j) sum[j] += from[j];
          }
          store_columns(p, m, task.w.k_begin + k0, count, sum);
        }
    });
  }
}

}  // namespace subbyte
