// The definition of binary_conv2d.
#include "subbyte/formats/bits.h"
#include "subbyte/ops/binary_conv2d/binary_conv2d.h"
#include "subbyte/ops/binary_matmul/scaled_sum.h"

namespace subbyte::reference {

void binary_conv2d(const BinaryConv2dParams& p) noexcept {
  const int64_t out_h = binary_conv2d_out_size(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h);
  const int64_t out_w = binary_conv2d_out_size(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w);
  const int64_t c_count = p.channels / p.groups, o_count = p.out_channels / p.groups;
  const int64_t k = c_count * p.kernel_h * p.kernel_w;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t o = 0; o < p.out_channels; ++o)
      for (int64_t i = 0; i < out_h; ++i)
        for (int64_t j = 0; j < out_w; ++j) {
          int64_t sum = 0;
          bool nan = false;
          for (int64_t c = 0; c < c_count; ++c)
            for (int64_t u = 0; u < p.kernel_h; ++u)
              for (int64_t v = 0; v < p.kernel_w; ++v) {
                const int64_t at = (c * p.kernel_h + u) * p.kernel_w + v;
                const bool w = p.weight_bits != nullptr ? get_code(p.weight_bits + o * stream_bytes(k, 1), at, 1) != 0
                                                        : is_plus(p.weight, p.weight_dtype, o * k + at, nan);
                const int64_t h = i * p.stride_h - p.pad_h + u * p.dilation_h;
                const int64_t l = j * p.stride_w - p.pad_w + v * p.dilation_w;
                if (h < 0 || h >= p.height || l < 0 || l >= p.width) {
                  sum += w ? p.pad_value : -p.pad_value;
                  continue;
                }
                const int64_t channel = o / o_count * c_count + c;
                const bool x = is_plus(
                    p.x, p.dtype, b * p.x_strides[0] + channel * p.x_strides[1] + h * p.x_strides[2] + l * p.x_strides[3], nan);
                sum += x == w ? 1 : -1;
              }
          store_scaled_sum(p.y, p.dtype, b * p.y_strides[0] + o * p.y_strides[1] + i * p.y_strides[2] + j * p.y_strides[3], sum,
                           nan, p.scale, p.second_scale, p.bias, o);
        }
}

}  // namespace subbyte::reference
