#include "subbyte/base/cuda_launch.h"
#include "subbyte/formats/cuda_testing.h"
#include "subbyte/ops/column_words/column_words_cuda.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;
using testing::Random;

TEST(ColumnWordsCuda, MovesTheBitsOfTheCpuInBothDirections) {
  testing::TestStream stream;
  Random r(5);
  std::vector<std::string> formats = {"sign", "uint2", "uint3", "uint4", "uint5", "uint6", "uint7", "uint8"};
  formats.push_back("uint8*32+uint6*32+uint5*64+uint4*32+uint3*96+uint2*32");
  formats.push_back("uint8*5+uint3*41+sign*242");
  for (const std::string& format : formats)
    for (const int64_t n : {1, 33, 300})
      for (const bool ordered : {false, true}) {
        const int64_t k = format.find('*') != std::string::npos ? 288 : 97;
        const RowLayout layout = row_layout(format, k);
        if (ordered && !layout.uniform()) continue;
        std::vector<int32_t> order(static_cast<size_t>(k)), inverse(static_cast<size_t>(k));
        for (int64_t i = 0; i < k; ++i) {
          order[size_t(i)] = int32_t(i * 29 % k);  // 29 has no divisor in common with 97
          inverse[size_t(i * 29 % k)] = int32_t(i);
        }
        std::vector<uint32_t> words(size_t(column_word_count(layout) * n));
        for (uint32_t& w : words) w = uint32_t(r.bits());
        std::vector<uint8_t> codes(size_t(n * layout.row_bytes));
        std::vector<uint32_t> clean(words.size());
        ColumnsToCodesParams in{layout, n, words.data(), ordered ? order.data() : nullptr, codes.data()};
        columns_to_codes(in);
        CodesToColumnsParams out{layout, n, codes.data(), ordered ? inverse.data() : nullptr, clean.data()};
        codes_to_columns(out);
        DeviceBuffer d_words(words), d_order(order), d_inverse(inverse), d_codes(int64_t(codes.size())),
            d_clean(int64_t(clean.size() * sizeof(uint32_t)));
        in.words = reinterpret_cast<const uint32_t*>(d_words.data());
        in.order = ordered ? reinterpret_cast<const int32_t*>(d_order.data()) : nullptr;
        in.codes = d_codes.data();
        cuda::columns_to_codes(in, stream.stream());
        out.codes = d_codes.data();
        out.order = ordered ? reinterpret_cast<const int32_t*>(d_inverse.data()) : nullptr;
        out.words = reinterpret_cast<uint32_t*>(d_clean.data());
        cuda::codes_to_columns(out, stream.stream());
        stream.wait();
        ASSERT_EQ(d_codes.host(), codes) << format << " " << n << " " << ordered;
        ASSERT_EQ(d_clean.host<uint32_t>(), clean) << format << " " << n << " " << ordered;
      }
}

}  // namespace
}  // namespace subbyte
