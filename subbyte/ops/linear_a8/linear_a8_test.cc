#include "subbyte/ops/linear_a8/linear_a8.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "subbyte/base/parallel_for.h"
#include "subbyte/base/philox.h"
#include "subbyte/ops/linear_a8/kernels.h"

namespace subbyte {
namespace {

// Memory that ends at a page nobody may touch, so that one byte read or written past the end stops the test; the bytes before
// it hold a pattern that check() compares.
class Guarded {
 public:
  explicit Guarded(size_t bytes, uint8_t fill = 0) : bytes_(bytes) {
    page_ = size_t(sysconf(_SC_PAGESIZE));
    mapped_ = (bytes + kFront + page_ - 1) / page_ * page_ + page_;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(base_ + mapped_ - page_, page_, PROT_NONE);
    data_ = base_ + mapped_ - page_ - bytes;
    std::memset(base_, 0xA5, size_t(data_ - base_));
    std::memset(data_, fill, bytes);
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() { return data_; }
  uint8_t* bytes() { return data_; }
  size_t size() const { return bytes_; }
  bool untouched_before() const {
    for (const uint8_t* p = data_ - kFront; p < data_; ++p)
      if (*p != 0xA5) return false;
    return true;
  }

 private:
  static constexpr size_t kFront = 64;
  size_t bytes_, page_, mapped_;
  uint8_t *base_, *data_;
};

class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}
  uint32_t word() { return philox_word(seed_, 0, at_++); }
  uint32_t below(uint32_t n) { return word() % n; }
  float uniform() { return uniform24(word()) * 2 - 1; }

 private:
  uint64_t seed_, at_ = 0;
};

struct Shape {
  std::string layout = "uint4";
  int64_t m = 1, n = 1, k = 1, group_size = 1;
  DType dtype = DType::kF32, scale_dtype = DType::kF32, zero_dtype = DType::kF32;
  ZeroKind zero_kind = ZeroKind::kFixed;
  ActivationScale x_scale = ActivationScale::kRow;
  bool perm = false, bias = false;
  int64_t x_pad = 0, y_pad = 0;
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << s.layout << " M=" << s.m << " N=" << s.n << " K=" << s.k << " group_size=" << s.group_size << " x "
             << dtype_name(s.dtype) << " scales " << dtype_name(s.scale_dtype) << " zeros " << dtype_name(s.zero_dtype)
             << " kind " << int(s.zero_kind) << (s.x_scale == ActivationScale::kRow ? " row" : " row and group")
             << (s.perm ? " perm" : "") << (s.bias ? " bias" : "") << " pads " << s.x_pad << " " << s.y_pad;
}

// A call with its arrays, and the formula of the header in double over codes taken out one at a time.
struct Problem {
  Problem(const Shape& shape, uint64_t seed, bool integers = false) : s(shape) {
    Random random(seed);
    p.dtype = s.dtype;
    p.m = s.m;
    p.x_stride = s.k + s.x_pad;
    p.y_stride = s.n + s.y_pad;
    p.x_scale = s.x_scale;
    PackedMatrix& w = p.w;
    w.layout = row_layout(s.layout, s.k);
    w.n = s.n;
    w.k = s.k;
    w.group_size = s.group_size;
    w.scale_dtype = s.scale_dtype;
    w.zero_dtype = s.zero_dtype;
    w.zero_kind = s.zero_kind;
    const int64_t x_count = s.m > 0 && s.k > 0 ? (s.m - 1) * p.x_stride + s.k : 0;
    const int64_t y_count = s.m > 0 && s.n > 0 ? (s.m - 1) * p.y_stride + s.n : 0;
    x = std::make_unique<Guarded>(size_t(x_count * dtype_bytes(s.dtype)));
    y = std::make_unique<Guarded>(size_t(y_count * dtype_bytes(s.dtype)), 0xff);  // NaN in every type
    codes = std::make_unique<Guarded>(size_t(w.codes_bytes()));
    scales = std::make_unique<Guarded>(size_t(s.n * w.groups() * dtype_bytes(s.scale_dtype)));
    zeros = std::make_unique<Guarded>(size_t(s.n * w.groups() * dtype_bytes(s.zero_dtype)));
    bias = std::make_unique<Guarded>(size_t(s.n * dtype_bytes(s.dtype)));
    for (int64_t i = 0; i < x_count; ++i)
      store_float(x->data(), s.dtype, i, integers ? float(int(random.below(255)) - 127) : random.uniform() * 3);
    if (integers)
      for (int64_t m = 0; m < s.m && s.k > 0; ++m)  // the largest is 127 everywhere: scale 1, xq = x
        for (int64_t k = 0; k < s.k; k += s.group_size) store_float(x->data(), s.dtype, m * p.x_stride + k, 127);
    for (int64_t n = 0; n < s.n; ++n)
      for (int i = 0; i < w.layout.segment_count; ++i) {
        const Segment& g = w.layout.segments[size_t(i)];
        for (int64_t k = 0; k < g.k_count; ++k)
          set_code(codes->bytes() + n * w.layout.row_bytes + g.byte_begin, k, format_bits(g.format),
                   random.below(uint32_t(format_levels(g.format))));
      }
    for (int64_t i = 0; i < s.n * w.groups(); ++i) {
      store_float(scales->data(), s.scale_dtype, i, integers ? 1.0f : 0.01f + 0.02f * std::fabs(random.uniform()));
      const float zero = s.zero_kind == ZeroKind::kZeros ? float(random.below(10)) : random.uniform() * 0.1f;
      store_float(zeros->data(), s.zero_dtype, i, integers ? float(random.below(4)) : zero);
    }
    for (int64_t i = 0; i < s.n; ++i) store_float(bias->data(), s.dtype, i, integers ? float(i % 7) : random.uniform());
    if (s.perm) {
      perm.resize(size_t(s.k));
      for (int64_t i = 0; i < s.k; ++i) perm[size_t(i)] = int32_t(i);
      for (int64_t i = s.k - 1; i > 0; --i) std::swap(perm[size_t(i)], perm[random.below(uint32_t(i + 1))]);
      w.perm = perm.data();
    }
    p.x = x->data();
    p.y = y->data();
    w.codes = codes->bytes();
    w.scales = scales->data();
    w.zeros = s.zero_kind == ZeroKind::kFixed ? nullptr : zeros->data();
    p.bias = s.bias ? bias->data() : nullptr;
  }

  // y in double and the magnitude that the bound multiplies, [M][N].
  void solve() {
    const PackedMatrix& w = p.w;
    const int64_t groups = w.groups();
    std::vector<int16_t> centered(size_t(s.n * s.k));
    std::vector<double> scale(size_t(s.n * groups)), at_middle(size_t(s.n * groups));
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t k = 0; k < s.k; ++k) {
        const Format f = segment_of(w.layout, k).format;
        const int c = format_levels(f) / 2;
        centered[size_t(n * s.k + k)] = int16_t(int(packed_code(w, n, k)) - c);
        if (k % s.group_size != 0) continue;
        const int64_t i = n * groups + k / s.group_size;
        const float sc = load_float(w.scales, w.scale_dtype, i);
        scale[size_t(i)] = sc;
        at_middle[size_t(i)] = affine_value(float(c), sc, group_zero(w, f, i), w.zero_kind);
      }
    want.assign(size_t(s.m * s.n), 0);
    magnitude.assign(size_t(s.m * s.n), 0);
    std::vector<int16_t> xq(static_cast<size_t>(s.k));
    std::vector<double> xs(static_cast<size_t>(groups));
    for (int64_t m = 0; m < s.m; ++m) {
      bool finite = true;
      auto at = [&](int64_t k) { return load_float(p.x, s.dtype, m * p.x_stride + (s.perm ? perm[size_t(k)] : k)); };
      for (int64_t g = 0; g < groups; ++g) {
        const bool row = s.x_scale == ActivationScale::kRow;
        const int64_t begin = g * s.group_size, end = min_i64(begin + s.group_size, s.k);
        float a = 0;
        for (int64_t k = row ? 0 : begin; k < (row ? s.k : end); ++k) {
          finite = finite && std::isfinite(at(k));
          a = std::max(a, std::fabs(at(k)));
        }
        if (!(a >= 0x1p-120f)) a = 0;
        xs[size_t(g)] = a / 127.0f;
        for (int64_t k = begin; k < end; ++k) xq[size_t(k)] = int16_t(a > 0 ? std::nearbyint(at(k) * (127.0f / a)) : 0);
      }
      for (int64_t n = 0; n < s.n; ++n) {
        const double b = p.bias != nullptr ? load_double(p.bias, s.dtype, n) : 0;
        double sum = b, absolute = std::fabs(b);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t begin = g * s.group_size, end = min_i64(begin + s.group_size, s.k), i = n * groups + g;
          int64_t d = 0, e = 0, all = 0;
          for (int64_t from = begin; from < end; from += 16384) {
            int d32 = 0, e32 = 0, a32 = 0;
            for (int64_t k = from; k < min_i64(from + 16384, end); ++k) {
              const int product = xq[size_t(k)] * centered[size_t(n * s.k + k)];
              d32 += product;
              a32 += std::abs(product);
              e32 += xq[size_t(k)];
            }
            d += d32;
            e += e32;
            all += a32;
          }
          const double factor = xs[size_t(g)];
          sum += factor * (scale[size_t(i)] * double(d) + at_middle[size_t(i)] * double(e));
          absolute += factor * (scale[size_t(i)] * double(all) + std::fabs(at_middle[size_t(i)] * double(e)));
        }
        want[size_t(m * s.n + n)] = finite ? sum : std::numeric_limits<double>::quiet_NaN();
        magnitude[size_t(m * s.n + n)] = absolute;
      }
    }
  }

  void run(const LinearA8Kernel& kernel) {
    if (y->size() != 0) std::memset(y->data(), 0xff, y->size());
    Guarded workspace(size_t(linear_a8_workspace_bytes(kernel, p)), 0xff);
    p.workspace = workspace.data();
    p.workspace_bytes = int64_t(workspace.size());
    linear_a8(kernel, p);
    EXPECT_TRUE(workspace.untouched_before());
    EXPECT_TRUE(y->untouched_before());
  }
  void run() { run(select_linear_a8_kernel(p.m, p.w.layout, p.w.group_size, active_isa())); }

  // Number of elements outside the bound of the header; elements between the rows of y must still be NaN.
  int64_t wrong(bool exact = false) {
    const double eps = 0x1p-24 * double(2 * p.w.groups() + 16), eps_y = dtype_epsilon(s.dtype);
    int64_t bad = 0;
    for (int64_t m = 0; m < s.m; ++m)
      for (int64_t n = 0; n < (m + 1 < s.m ? p.y_stride : s.n); ++n) {
        const double got = load_float(p.y, s.dtype, m * p.y_stride + n);
        if (n >= s.n) {
          bad += !std::isnan(got);
          continue;
        }
        const size_t i = size_t(m * s.n + n);
        if (std::isnan(want[i])) bad += !std::isnan(got);
        else if (exact) bad += !(got == want[i]);
        else
          bad += !(std::fabs(got - want[i]) <=
                   eps * magnitude[i] + eps_y * std::fabs(want[i]) * (1 + 0x1p-10) + (s.dtype == DType::kF16 ? 0x1p-25 : 0));
      }
    return bad;
  }

  Shape s;
  LinearA8Params p;
  std::unique_ptr<Guarded> x, y, codes, scales, zeros, bias;
  std::vector<int32_t> perm;
  std::vector<double> want, magnitude;
};

std::vector<const LinearA8Kernel*> present_kernels() {
  std::vector<const LinearA8Kernel*> out;
  for (const LinearA8Kernel& k : linear_a8_kernels())
    if (k.isa <= active_isa()) out.push_back(&k);
  return out;
}

// Runs every kernel that this machine has over the problem; counts the runs by kernel.
void expect_all_kernels(Problem& problem, bool exact, std::map<std::string, int>* runs = nullptr,
                        int64_t reference_limit = 1 << 22) {
  problem.solve();
  for (const LinearA8Kernel* k : present_kernels()) {
    if (!serves(*k, problem.p.w.layout, problem.s.group_size)) continue;
    if (k->isa == Isa::kScalar && problem.s.m * problem.s.n * problem.s.k > reference_limit) continue;
    problem.run(*k);
    ASSERT_EQ(problem.wrong(exact), 0) << k->name << " " << problem.s;
    if (runs != nullptr) ++(*runs)[k->name];
  }
}

constexpr int64_t kMs[] = {0, 1, 2, 3, 7, 8, 17, 64, 333};
constexpr int64_t kSizes[] = {1, 5, 64, 127, 576, 1536, 4097};
constexpr int64_t kGroups[] = {16, 32, 64, 100, 128, 0};  // 0: K
constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16};

// Rows of several widths whose boundaries are multiples of the group.
std::string mixed_layout(int kind, int64_t k, int64_t group_size) {
  const char* widths[][3] = {{"uint8", "uint4", "uint2"}, {"uint5", "uint3", "uint6"}, {"sign", "uint7", "ternary"}};
  const int64_t first = group_size, second = (k - group_size) / 2 / group_size * group_size;
  if (first >= k || second == 0 || first + second >= k) return widths[kind][1];
  return std::string(widths[kind][0]) + "*" + std::to_string(first) + "+" + widths[kind][1] + "*" + std::to_string(second) +
         "+" + widths[kind][2] + "*" + std::to_string(k - first - second);
}

TEST(LinearA8, EveryKernelKeepsTheBoundForEveryFormatShapeAndType) {
  std::map<std::string, int> runs;
  Random random(20261122);
  int64_t problems = 0;
  for (int format = 0; format < kFormatCount + 3; ++format)
    for (const ZeroKind kind : {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets})
      for (const ActivationScale x_scale : {ActivationScale::kRow, ActivationScale::kRowGroup})
        for (int i = 0; i < 9; ++i) {
          Shape s;
          s.k = kSizes[size_t(problems) % std::size(kSizes)];
          s.group_size = kGroups[random.below(uint32_t(std::size(kGroups)))];
          if (s.group_size == 0) s.group_size = s.k;
          s.m = kMs[(size_t(problems) / 7 + size_t(i)) % std::size(kMs)];
          do s.n = kSizes[random.below(uint32_t(std::size(kSizes)))];
          while (s.m * s.n * s.k > (int64_t(1) << 24) && s.n > 5);
          s.layout = format < kFormatCount ? kFormats[format].name : mixed_layout(format - kFormatCount, s.k, s.group_size);
          s.dtype = kTypes[random.below(3)];
          s.scale_dtype = kTypes[random.below(3)];
          s.zero_dtype = kTypes[random.below(3)];
          s.zero_kind = kind;
          s.x_scale = x_scale;
          s.perm = random.below(3) == 0;
          s.bias = random.below(2) == 0;
          s.x_pad = random.below(2) * 3;
          s.y_pad = random.below(2) * 5;
          ++problems;
          Problem problem(s, uint64_t(problems));
          expect_all_kernels(problem, false, &runs);
          if (HasFatalFailure()) return;
        }
  for (const LinearA8Kernel& k : linear_a8_kernels()) {
    if (k.isa <= active_isa()) EXPECT_GT(runs[k.name], 50) << k.name;
    else std::printf("skipped, not on this machine: %s\n", k.name);
  }
}

TEST(LinearA8, IntegerProblemsAreExactOnEveryPath) {
  std::map<std::string, int> runs;
  int64_t seed = 0;
  for (int format = 0; format < kFormatCount; ++format)
    for (const int64_t group_size : {16, 32, 100, 128, 512, 4097})
      for (const int64_t m : {1, 2, 3, 4, 5, 11}) {
        Shape s;
        s.layout = kFormats[format].name;
        s.k = group_size >= 128 ? 1031 : 517;  // |y| < 2^24: 127 * 128 * 1031 and the offsets
        s.n = 37;
        s.m = m;
        s.group_size = group_size;
        s.zero_kind = ZeroKind(seed % 3);
        s.x_scale = seed % 2 == 0 ? ActivationScale::kRow : ActivationScale::kRowGroup;
        s.bias = seed % 5 == 0;
        Problem problem(s, uint64_t(++seed), true);
        if (s.zero_kind == ZeroKind::kFixed && s.layout == "sign")  // the fixed zero 1/2 needs an even scale to stay whole
          for (int64_t i = 0; i < s.n * problem.p.w.groups(); ++i) store_float(problem.scales->data(), DType::kF32, i, 2);
        expect_all_kernels(problem, true, &runs);
        if (HasFatalFailure()) return;
      }
  for (const LinearA8Kernel* k : present_kernels()) EXPECT_GT(runs[k->name], 0) << k->name;
}

// Every code at its largest (or smallest) and every x at +-max: where a saturating instruction would lose bits.
TEST(LinearA8, ExtremeCodesAndActivationsNeverSaturate) {
  for (int format = 0; format < kFormatCount; ++format)
    for (const int64_t k : {4097, 65536})
      for (const bool top : {true, false})
        for (const int signs : {0, 1, 2}) {
          Shape s;
          s.layout = kFormats[format].name;
          s.k = k;
          s.n = 3;
          s.m = k == 4097 ? 5 : 1;
          s.group_size = k == 4097 && signs == 1 ? 512 : k;
          Problem problem(s, 1);
          for (int64_t i = 0; i < s.m * k; ++i)
            store_float(problem.x->data(), DType::kF32, i,
                        signs == 0   ? 127.0f
                        : signs == 1 ? -127.0f
                        : i % 2 == 0 ? 127.0f
                                     : -127.0f);
          for (int64_t n = 0; n < s.n; ++n)
            for (int64_t i = 0; i < k; ++i)
              set_code(problem.codes->bytes() + n * problem.p.w.layout.row_bytes, i, kFormats[format].bits,
                       top ? uint32_t(kFormats[format].levels - 1) : 0);
          for (int64_t i = 0; i < s.n * problem.p.w.groups(); ++i) store_float(problem.scales->data(), DType::kF32, i, 1.0f);
          expect_all_kernels(problem, false);
          if (HasFatalFailure()) return;
        }
}

// The last row of codes ends where memory ends: a load that runs past any length of row is caught.
TEST(LinearA8, EveryLengthOfRowIsReadToItsEndAndNoFurther) {
  for (int format = 0; format < kFormatCount; ++format)
    for (int64_t k = 1; k <= 140; ++k) {
      Shape s;
      s.layout = kFormats[format].name;
      s.k = k;
      s.n = 1 + k % 2;
      s.m = 1 + k % 3;
      s.group_size = k % 2 == 0 ? 32 : k;
      Problem problem(s, uint64_t(k));
      expect_all_kernels(problem, false);
      if (HasFatalFailure()) return;
    }
}

TEST(LinearA8, GroupsBeyondInt32GoToTheReference) {
  const RowLayout layout = row_layout("uint8", 131073);
  for (const LinearA8Kernel& k : linear_a8_kernels()) EXPECT_EQ(serves(k, layout, 131073), k.isa == Isa::kScalar) << k.name;
  EXPECT_STREQ(select_linear_a8_kernel(1, layout, 131073, Isa::kAvx512Vnni).name, "linear_a8_reference");
  Shape s;
  s.layout = "uint8";
  s.k = 131073;
  s.group_size = s.k;
  Problem problem(s, 3);
  expect_all_kernels(problem, false);
}

TEST(LinearA8, ARowWithNaNOrInfinityIsNaNAndOthersAreNot) {
  for (const char* layout : {"uint8", "uint4", "uint3", "sign"})
    for (const ActivationScale x_scale : {ActivationScale::kRow, ActivationScale::kRowGroup})
      for (const DType type : kTypes)
        for (const int64_t m : {3, 9}) {
          Shape s;
          s.layout = layout;
          s.m = m;
          s.n = 19;
          s.k = 133;
          s.group_size = 32;
          s.dtype = type;
          s.x_scale = x_scale;
          s.bias = true;
          Problem problem(s, 4);
          store_float(problem.x->data(), type, 132, std::numeric_limits<float>::quiet_NaN());
          store_float(problem.x->data(), type, 133 * 2 + 5, -std::numeric_limits<float>::infinity());
          expect_all_kernels(problem, false);
          ASSERT_TRUE(std::isnan(problem.want[0]) && !std::isnan(problem.want[19]) && std::isnan(problem.want[38]));
          if (HasFatalFailure()) return;
        }
}

TEST(LinearA8, ZeroAndVanishingRowsGiveTheBias) {
  for (const char* layout : {"uint8", "uint4", "uint5", "ternary"})
    for (const float value : {0.0f, 0x1p-140f, 0x1.8p-121f, 0x1p-119f}) {
      Shape s;
      s.layout = layout;
      s.m = 2;
      s.n = 9;
      s.k = 70;
      s.group_size = 32;
      s.bias = true;
      s.zero_kind = ZeroKind::kOffsets;
      Problem problem(s, 5);
      for (int64_t i = 0; i < s.k; ++i) store_float(problem.x->data(), DType::kF32, i, i % 3 == 0 ? value : 0.0f);
      expect_all_kernels(problem, false);
      if (HasFatalFailure()) return;
    }
}

TEST(LinearA8, EmptyXGivesTheBiasAndEmptyYIsNotTouched) {
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{3, 5, 0}, {0, 5, 7}, {3, 0, 7}, {0, 0, 0}}) {
    Shape s;
    s.m = m;
    s.n = n;
    s.k = k;
    s.group_size = 32;
    s.bias = true;
    Problem problem(s, 6);
    expect_all_kernels(problem, false);
  }
}

TEST(LinearA8, OneLargeProductKeepsTheBound) {
  for (const char* layout : {"uint4", "uint3", "uint8"}) {
    Shape s;
    s.layout = layout;
    s.m = 333;
    s.n = 127;
    s.k = 1536;
    s.group_size = 128;
    s.bias = true;
    Problem problem(s, 7);
    expect_all_kernels(problem, false);
  }
}

TEST(LinearA8, SameBitsForAnyNumberOfThreadsAndAnyCut) {
  const int before = num_threads();
  for (const char* layout : {"uint4", "uint3", "sign"})
    for (const int64_t m : {1, 5, 21}) {
      Shape s;
      s.layout = layout;
      s.m = m;
      s.n = 211;
      s.k = 577;
      s.group_size = 64;
      s.zero_kind = ZeroKind::kZeros;
      Problem problem(s, 8);
      for (const LinearA8Kernel* k : present_kernels()) {
        if (!serves(*k, problem.p.w.layout, s.group_size)) continue;
        set_num_threads(1);
        problem.run(*k);
        const std::vector<uint8_t> one(problem.y->bytes(), problem.y->bytes() + problem.y->size());
        for (const int threads : {2, 3, 7}) {
          set_num_threads(threads);
          problem.run(*k);
          EXPECT_EQ(std::memcmp(one.data(), problem.y->bytes(), one.size()), 0)
              << k->name << " " << s << " threads " << threads;
        }
        set_parallel_backend([](int64_t size, int64_t, ParallelBody body, void* context) {
          for (int64_t i = size - 1; i >= 0; --i) body(context, i, i + 1);  // one row of weight at a time, backwards
        });
        problem.run(*k);
        set_parallel_backend(nullptr);
        EXPECT_EQ(std::memcmp(one.data(), problem.y->bytes(), one.size()), 0) << k->name << " " << s << " row by row";
      }
    }
  set_num_threads(before);
}

TEST(LinearA8, EveryInstructionSetIsForcedThroughTheEntry) {
  const Isa best = active_isa();
  for (int isa = 0; isa <= int(best); ++isa) {
    const ScopedIsa forced{Isa(isa)};
    for (const int64_t m : {1, 40}) {
      Shape s;
      s.m = m;
      s.n = 33;
      s.k = 160;
      s.group_size = 32;
      Problem problem(s, 9);
      problem.solve();
      Guarded workspace(size_t(linear_a8_workspace_bytes(problem.p)));
      problem.p.workspace = workspace.data();
      problem.p.workspace_bytes = int64_t(workspace.size());
      linear_a8(problem.p);
      EXPECT_EQ(problem.wrong(), 0) << isa_name(Isa(isa));
      EXPECT_EQ(select_linear_a8_kernel(m, problem.p.w.layout, 32, active_isa()).isa, Isa(isa));
    }
  }
}

TEST(LinearA8, SelectionPrefersTheBestSetAndFallsBackByShape) {
  const auto name = [](int64_t m, const char* layout, int64_t k, int64_t group_size, Isa isa) {
    return std::string(select_linear_a8_kernel(m, row_layout(layout, k), group_size, isa).name);
  };
  EXPECT_EQ(name(1, "uint4", 4096, 128, Isa::kScalar), "linear_a8_reference");
  EXPECT_EQ(name(1, "uint4", 4096, 128, Isa::kAvx2), "linear_a8_rowdot_avx2");
  EXPECT_EQ(name(1, "uint4", 4096, 4096, Isa::kAvx2), "linear_a8_rowdot_avx2");
  EXPECT_EQ(name(1, "uint4", 4096, 100, Isa::kAvx2), "linear_a8_panel_avx2");  // no whole lanes
  EXPECT_EQ(name(1, "uint3", 4096, 128, Isa::kAvx2), "linear_a8_panel_avx2");  // codes straddle bytes
  EXPECT_EQ(name(1, "sign", 4096, 16, Isa::kAvx2), "linear_a8_panel_avx2");    // half a lane
  EXPECT_EQ(name(1, "uint8*128+uint4*128", 256, 128, Isa::kAvx2), "linear_a8_rowdot_avx2");
  EXPECT_EQ(name(1, "uint8*128+uint3*128", 256, 128, Isa::kAvx2), "linear_a8_panel_avx2");
  EXPECT_EQ(name(512, "uint4", 4096, 128, Isa::kAvx2), "linear_a8_panel_avx2");
  EXPECT_EQ(name(1, "uint4", 4096, 128, Isa::kAvx512), "linear_a8_rowdot_avx512");
  EXPECT_EQ(name(1, "uint4", 4096, 128, Isa::kAvx512Vnni), "linear_a8_rowdot_avx512_vnni");
  EXPECT_EQ(name(1, "uint2", 4096, 16, Isa::kAvx512Vnni), "linear_a8_rowdot_avx512_vnni");  // one lane a group
  EXPECT_EQ(name(1, "uint6", 4096, 128, Isa::kAvx512Vnni), "linear_a8_panel_avx512_vnni");
  EXPECT_EQ(name(512, "sign", 4096, 4096, Isa::kAvx512Vnni), "linear_a8_panel_avx512_vnni");
  for (int i = 0; i < kIsaCount; ++i)
    for (const int64_t m : kMs)
      for (int f = 0; f < kFormatCount; ++f) {
        const LinearA8Kernel& k = select_linear_a8_kernel(m, row_layout(kFormats[f].name, 576), 64, Isa(i));
        EXPECT_LE(k.isa, Isa(i));
        EXPECT_TRUE(serves(k, row_layout(kFormats[f].name, 576), 64));
      }
}

std::string error_of(const LinearA8Params& p) {
  try {
    linear_a8(p);
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

TEST(LinearA8, MistakesOfTheCallerAreNamed) {
  Shape s;
  s.m = 2;
  s.n = 3;
  s.k = 64;
  s.group_size = 32;
  Problem problem(s, 10);
  LinearA8Params p = problem.p;
  p.x_stride = 63;
  EXPECT_EQ(error_of(p), "linear_a8: row stride of x 63 is below K = 64");
  p = problem.p;
  p.y_stride = 2;
  EXPECT_EQ(error_of(p), "linear_a8: row stride of y 2 is below N = 3");
  p = problem.p;
  p.dtype = DType::kF64;
  EXPECT_EQ(error_of(p), "linear_a8: x is float64, expected float32, float16 or bfloat16");
  p = problem.p;
  p.m = -1;
  EXPECT_EQ(error_of(p), "linear_a8: x has -1 rows, expected at least 0");
  p = problem.p;
  p.y = nullptr;
  EXPECT_EQ(error_of(p), "linear_a8: x or y are missing");
  std::vector<int32_t> perm(64, 64);
  p = problem.p;
  p.w.perm = perm.data();
  EXPECT_EQ(error_of(p), "linear_a8: perm[0] is 64, expected 0 <= perm < K = 64");
  if (active_isa() == Isa::kScalar) return;  // the reference takes no workspace
  p = problem.p;
  const std::string bytes = std::to_string(linear_a8_workspace_bytes(p));
  EXPECT_EQ(error_of(p), "linear_a8: the workspace has 0 bytes, expected linear_a8_workspace_bytes() = " + bytes);
  Guarded workspace(size_t(linear_a8_workspace_bytes(p)) + 64);
  p.workspace = workspace.bytes() + 4;
  p.workspace_bytes = linear_a8_workspace_bytes(p);
  EXPECT_EQ(error_of(p), "linear_a8: the workspace is not 64-byte aligned");
  for (int64_t i = 0; i < 6; ++i) EXPECT_TRUE(std::isnan(load_float(p.y, DType::kF32, i)));  // nothing was written
}

}  // namespace
}  // namespace subbyte
