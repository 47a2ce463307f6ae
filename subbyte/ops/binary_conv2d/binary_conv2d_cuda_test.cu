#include "subbyte/formats/bits.h"
#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/binary_conv2d/binary_conv2d_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

struct Case {
  int64_t b, c, h, w, o, kh, kw, sh, sw, ph, pw, dh, dw, groups;
};
constexpr Case kCases[] = {
    {2, 3, 7, 5, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1},   {1, 8, 9, 9, 33, 3, 3, 2, 2, 1, 1, 1, 1, 1},
    {2, 12, 6, 11, 6, 2, 5, 1, 3, 2, 0, 2, 1, 3}, {1, 70, 5, 4, 40, 1, 1, 1, 1, 0, 0, 1, 1, 1},
    {3, 4, 8, 6, 4, 3, 2, 1, 2, 4, 3, 3, 2, 4},   {1, 130, 4, 4, 300, 3, 3, 1, 1, 1, 1, 1, 1, 1},
    {1, 1, 1, 1, 1, 5, 5, 1, 1, 2, 2, 1, 1, 1},   {1, 0, 4, 4, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1},
};

TEST(BinaryConv2dCuda, GivesTheReferencesBits) {
  testing::TestStream stream;
  Random r(6);
  constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};
  int i = 0;
  for (const Case& c : kCases)
    for (int pad_value = -1; pad_value <= 1; ++pad_value)
      for (int bits = 0; bits < 2; ++bits, ++i) {
        BinaryConv2dParams p;
        p.dtype = kTypes[i % 4];
        p.weight_dtype = kTypes[i / 3 % 4];
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
        p.pad_value = pad_value;
        const int64_t oh = binary_conv2d_out_size(c.h, c.kh, c.sh, c.ph, c.dh);
        const int64_t ow = binary_conv2d_out_size(c.w, c.kw, c.sw, c.pw, c.dw);
        const bool last = i % 2 == 1;
        const auto strides = [&](int64_t* s, int64_t channels, int64_t h, int64_t w) {
          s[0] = channels * h * w;
          s[1] = last ? 1 : h * w;
          s[2] = last ? w * channels : w;
          s[3] = last ? channels : 1;
        };
        strides(p.x_strides, c.c, c.h, c.w);
        strides(p.y_strides, c.o, oh, ow);
        const int64_t k = c.c / c.groups * c.kh * c.kw, count = c.b * c.o * oh * ow;
        std::vector<uint8_t> x = testing::random_floats(r, c.b * c.c * c.h * c.w, p.dtype);
        if (i % 3 == 0 && !x.empty()) store_float(x.data(), p.dtype, 0, NAN);
        const std::vector<uint8_t> w = testing::random_floats(r, c.o * k, p.weight_dtype);
        std::vector<uint8_t> codes(size_t(c.o * stream_bytes(k, 1)));
        for (uint8_t& v : codes) v = uint8_t(r.bits());
        const std::vector<uint8_t> bias = testing::random_floats(r, c.o, p.dtype);
        const float scale = 0.3f;
        const double wide = 0.3;
        std::vector<uint8_t> scale_bytes(p.dtype == DType::kF64 ? 8 : 4);
        std::memcpy(scale_bytes.data(), p.dtype == DType::kF64 ? static_cast<const void*>(&wide) : &scale, scale_bytes.size());
        std::vector<uint8_t> want(size_t(count * dtype_bytes(p.dtype)), 0xff);
        p.x = x.data();
        p.weight = bits ? nullptr : w.data();
        p.weight_bits = bits ? codes.data() : nullptr;
        p.scale = p.second_scale = scale_bytes.data();
        p.bias = bias.data();
        p.y = want.data();
        reference::binary_conv2d(p);
        DeviceBuffer dx(x), dw(w), dcodes(codes), dscale(scale_bytes), dbias(bias), dy(int64_t(want.size()));
        p.x = dx.data();
        p.weight = bits ? nullptr : dw.data();
        p.weight_bits = bits ? dcodes.data() : nullptr;
        p.scale = p.second_scale = dscale.data();
        p.bias = dbias.data();
        p.y = dy.data();
        p.workspace_bytes = cuda::binary_conv2d_workspace_bytes(p);
        DeviceBuffer workspace(p.workspace_bytes);
        p.workspace = workspace.data();
        cuda::binary_conv2d(p, stream.stream());
        stream.wait();
        workspace.host();  // checks the guards
        const std::vector<uint8_t> got = dy.host();
        for (int64_t e = 0; e < count; ++e) {
          const double a = load_double(want.data(), p.dtype, e), b = load_double(got.data(), p.dtype, e);
          ASSERT_TRUE(a == b || (std::isnan(a) && std::isnan(b)))
              << "case " << &c - kCases << " pad_value " << pad_value << " bits " << bits << " element " << e;
        }
      }
}

}  // namespace
}  // namespace subbyte
