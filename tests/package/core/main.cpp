// A program of another project: the core alone, no torch.
#include <cmath>
#include <cstdio>
#include <vector>

#include "subbyte/ops/linear/linear.h"
#include "subbyte/ops/quantize/quantize.h"

int main() {
  constexpr int64_t kN = 3, kK = 40, kGroup = 16, kGroups = 3;
  const subbyte::RowLayout layout = subbyte::row_layout("uint8", kK);
  std::vector<float> dense(kN * kK), x(kK), y(kN), scales(kN * kGroups), offsets(kN * kGroups);
  std::vector<uint8_t> codes(size_t(kN * layout.row_bytes));
  for (int64_t i = 0; i < kN * kK; ++i) dense[size_t(i)] = std::sin(float(i));
  for (int64_t i = 0; i < kK; ++i) x[size_t(i)] = std::cos(float(i));

  subbyte::QuantizeParams q;
  q.w = dense.data();
  q.w_stride = kK;
  q.out.layout = layout;
  q.out.n = kN;
  q.out.k = kK;
  q.out.group_size = kGroup;
  q.out.zero_kind = subbyte::ZeroKind::kOffsets;
  q.codes = codes.data();
  q.scales = scales.data();
  q.zeros = offsets.data();
  subbyte::quantize(q);

  subbyte::LinearParams p;
  p.x = x.data();
  p.m = 1;
  p.x_stride = kK;
  p.w = q.out;
  p.w.codes = codes.data();
  p.w.scales = scales.data();
  p.w.zeros = offsets.data();
  p.y = y.data();
  p.y_stride = kN;
  std::vector<uint8_t> memory(size_t(subbyte::linear_workspace_bytes(p)) + 64);
  p.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  p.workspace_bytes = subbyte::linear_workspace_bytes(p);
  subbyte::linear(p);

  for (int64_t n = 0; n < kN; ++n) {
    float wanted = 0;
    for (int64_t k = 0; k < kK; ++k) wanted += dense[size_t(n * kK + k)] * x[size_t(k)];
    if (!(std::fabs(wanted - y[size_t(n)]) < 0.2f)) {
      std::printf("row %d is %g, expected about %g\n", int(n), y[size_t(n)], wanted);
      return 1;
    }
  }
  std::printf("core: ok\n");
  return 0;
}
