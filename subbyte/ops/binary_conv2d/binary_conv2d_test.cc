#include "subbyte/ops/binary_conv2d/binary_conv2d.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/bits.h"

namespace subbyte {
namespace {

struct Case {
  int64_t b, c, h, w, o, kh, kw, sh, sw, ph, pw, dh, dw, groups;
};
constexpr Case kCases[] = {
    {2, 3, 7, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1},   {1, 8, 9, 9, 33, 3, 3, 2, 2, 1, 1, 1, 1, 1},
    {2, 12, 6, 11, 6, 2, 5, 1, 3, 2, 0, 2, 1, 3}, {1, 70, 5, 4, 40, 1, 1, 1, 1, 0, 0, 1, 1, 1},
    {3, 4, 8, 6, 4, 3, 2, 1, 2, 4, 3, 3, 2, 4},   {1, 130, 4, 4, 300, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {1, 1, 1, 1, 1, 5, 5, 1, 1, 2, 2, 1, 1, 1},   {2, 16, 3, 3, 8, 7, 7, 3, 1, 3, 3, 1, 1, 2},
    {0, 4, 4, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1},   {1, 0, 4, 4, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {1, 4, 3, 3, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1},
};

std::vector<uint8_t> values(int64_t count, DType t, unsigned seed) {
  std::mt19937 r(seed);
  std::vector<uint8_t> out(size_t(count * dtype_bytes(t)) + 8);
  for (int64_t i = 0; i < count; ++i) {
    const int v = int(r() % 9) - 4;
    store_double(out.data(), t, i, v == 0 ? (r() % 2 != 0 ? 0.0 : -0.0) : double(v));
  }
  return out;
}

struct Options {
  int pad_value = 0;
  bool bits = false, channels_last = false, reference = false, nan = false;
  DType dtype = DType::kF32, weight_dtype = DType::kF32;
};

std::vector<uint8_t> run(const Case& c, const Options& o) {
  BinaryConv2dParams p;
  p.dtype = o.dtype;
  p.weight_dtype = o.weight_dtype;
  p.batch = c.b;
  p.channels = c.c;
  p.height = c.h;
  p.width = c.w;
  p.out_channels = c.o;
  p.kernel_h = c.kh;
  p.kernel_w = c.kw;
  p.stride_h = c.sh;
  p.stride_w = c.sw;
  p.pad_h = c.ph;
  p.pad_w = c.pw;
  p.dilation_h = c.dh;
  p.dilation_w = c.dw;
  p.groups = c.groups;
  p.pad_value = o.pad_value;
  const int64_t oh = binary_conv2d_out_size(c.h, c.kh, c.sh, c.ph, c.dh),
                ow = binary_conv2d_out_size(c.w, c.kw, c.sw, c.pw, c.dw);
  const auto strides = [&](int64_t* s, int64_t channels, int64_t h, int64_t w) {
    s[0] = channels * h * w;
    s[1] = o.channels_last ? 1 : h * w;
    s[2] = o.channels_last ? w * channels : w;
    s[3] = o.channels_last ? channels : 1;
  };
  strides(p.x_strides, c.c, c.h, c.w);
  strides(p.y_strides, c.o, oh, ow);
  const int64_t k = c.c / c.groups * c.kh * c.kw, count = c.b * c.o * oh * ow;
  std::vector<uint8_t> x = values(c.b * c.c * c.h * c.w, o.dtype, 1);
  if (o.nan && x.size() > 8) store_double(x.data(), o.dtype, 0, std::numeric_limits<double>::quiet_NaN());
  const std::vector<uint8_t> w = values(c.o * k, o.weight_dtype, 2), bias = values(c.o, o.dtype, 3);
  std::mt19937 r(4);
  std::vector<uint8_t> bits(size_t(c.o * stream_bytes(k, 1)) + 1);
  for (uint8_t& b : bits) b = uint8_t(r());
  std::vector<uint8_t> y(size_t((count + 16) * dtype_bytes(o.dtype)));
  for (int64_t i = 0; i < count + 16; ++i) store_double(y.data(), o.dtype, i, std::numeric_limits<double>::quiet_NaN());
  const float scale = 0.37f;
  const double wide = 0.37;
  p.x = x.data();
  if (o.bits) p.weight_bits = bits.data();
  else p.weight = w.data();
  p.scale = p.second_scale = o.dtype == DType::kF64 ? static_cast<const void*>(&wide) : &scale;
  p.bias = bias.data();
  p.y = y.data();
  if (o.reference) {
    reference::binary_conv2d(p);
  } else {
    const int64_t bytes = binary_conv2d_workspace_bytes(p);
    std::vector<uint8_t> memory(size_t(bytes) + 128, 0xff);
    p.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    p.workspace_bytes = bytes;
    binary_conv2d(p);
    const uint8_t* end = static_cast<const uint8_t*>(p.workspace) + bytes;
    for (int i = 0; i < 64; ++i) EXPECT_EQ(end[i], 0xff) << "wrote past the workspace";
  }
  for (int64_t i = count; i < count + 16; ++i) EXPECT_TRUE(std::isnan(load_double(y.data(), o.dtype, i))) << "wrote past y";
  return y;
}

TEST(BinaryConv2d, EveryPathGivesTheReferencesBits) {
  int tried = 0;
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (const Case& c : kCases)
      for (int pad_value : {-1, 0, 1})
        for (bool bits : {false, true}) {
          Options o;
          o.pad_value = pad_value;
          o.bits = bits;
          o.channels_last = tried % 3 == 1;
          o.nan = tried % 5 == 2;
          Options want = o;
          want.reference = true;
          ASSERT_EQ(run(c, o), run(c, want))
              << isa_name(Isa(isa)) << " case " << &c - kCases << " pad_value " << pad_value << " bits " << bits;
          ++tried;
        }
  }
  EXPECT_GE(tried, 60);
}

TEST(BinaryConv2d, TakesEveryDtype) {
  for (DType t : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64})
    for (DType w : {DType::kF32, DType::kBF16}) {
      Options o;
      o.dtype = t;
      o.weight_dtype = w;
      Options want = o;
      want.reference = true;
      EXPECT_EQ(run(kCases[0], o), run(kCases[0], want)) << dtype_name(t);
    }
}

TEST(BinaryConv2d, ValuesWorkedOutByHand) {
  // One channel, image 2x2 of + - / - +, kernel 3x3 of +, padding 1: every window sees all four pixels, sum 0, and 5 paddings.
  const float x[4] = {1, -1, -1, 0}, w[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
  for (const auto& [pad_value, want] : {std::pair<int, float>{0, 0.0f}, {-1, -5.0f}, {1, 5.0f}}) {
    float y[4] = {NAN, NAN, NAN, NAN};
    BinaryConv2dParams p;
    p.x = x;
    p.weight = w;
    p.y = y;
    p.batch = p.channels = p.out_channels = 1;
    p.height = p.width = 2;
    p.kernel_h = p.kernel_w = 3;
    p.pad_h = p.pad_w = 1;
    p.pad_value = pad_value;
    p.x_strides[0] = p.y_strides[0] = 4;
    p.x_strides[1] = p.y_strides[1] = 4;
    p.x_strides[2] = p.y_strides[2] = 2;
    p.x_strides[3] = p.y_strides[3] = 1;
    std::vector<uint8_t> memory(size_t(binary_conv2d_workspace_bytes(p)) + 64);
    p.workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    p.workspace_bytes = binary_conv2d_workspace_bytes(p);
    binary_conv2d(p);
    for (float v : y) EXPECT_EQ(v, want) << pad_value;
  }
}

TEST(BinaryConv2d, DoesNotDependOnTheNumberOfThreads) {
  set_num_threads(1);
  const auto one = run(kCases[5], {});
  set_num_threads(3);
  EXPECT_EQ(run(kCases[5], {}), one);
}

TEST(BinaryConv2d, RefusesWhatItCannotMean) {
  float v[16] = {};
  BinaryConv2dParams p;
  p.batch = p.channels = p.out_channels = 1;
  p.height = p.width = 2;
  p.x = p.weight = v;
  p.y = v;
  const auto refused = [](BinaryConv2dParams q) { EXPECT_THROW(binary_conv2d(q), std::invalid_argument); };
  refused(p);  // no workspace
  BinaryConv2dParams q = p;
  q.kernel_h = 3;
  refused(q);
  q = p;
  q.groups = 2;
  refused(q);
  q = p;
  q.pad_value = 2;
  refused(q);
  q = p;
  q.stride_w = 0;
  refused(q);
  q = p;
  q.weight = nullptr;
  refused(q);
  q = p;
  q.height = -1;
  refused(q);
}

}  // namespace
}  // namespace subbyte
