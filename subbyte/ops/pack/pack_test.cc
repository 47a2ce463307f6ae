#include "subbyte/ops/pack/pack.h"

#include <gtest/gtest.h>

#include "subbyte/base/guarded_buffer_test.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/formats/golden_test.h"
#include "subbyte/formats/random_matrix_test.h"
#include "subbyte/ops/pack/kernels.h"

namespace subbyte {
namespace {

using testing::GoldenCase;
using testing::GuardedBuffer;

class PackKernelTest : public ::testing::TestWithParam<size_t> {
 protected:
  const PackKernel& kernel() const { return pack_kernels()[GetParam()]; }
  void SetUp() override {
    if (kernel().isa > detected_isa()) GTEST_SKIP() << kernel().name << " needs " << isa_name(kernel().isa);
  }
};
INSTANTIATE_TEST_SUITE_P(Table, PackKernelTest, ::testing::Range(size_t(0), pack_kernels().size()),
                         [](const auto& row) { return std::string(pack_kernels()[row.param].name); });

TEST_P(PackKernelTest, PacksAndUnpacksEveryWidthAndCountAsTheReferenceAndTouchesNothingElse) {
  std::mt19937 rng(7);
  for (int bits = 1; bits <= 8; ++bits)
    for (int64_t count = 0; count < 300; ++count) {
      const int64_t bytes = stream_bytes(count, bits);
      GuardedBuffer<uint8_t> codes(count), packed(bytes), want(bytes), unpacked(count);
      for (int64_t k = 0; k < count; ++k) codes[k] = uint8_t(rng() & ((1u << bits) - 1));
      reference::pack_codes(codes.data(), count, bits, want.data());
      kernel().pack(codes.data(), count, bits, packed.data());
      ASSERT_EQ(packed.copy(), want.copy()) << bits << " bits, " << count << " codes";
      if (bytes != 0) packed[bytes - 1] |= uint8_t(0xff << ((count * bits - 1) % 8 + 1));  // spare bits are not read
      kernel().unpack(packed.data(), count, bits, unpacked.data());
      ASSERT_EQ(unpacked.copy(), codes.copy()) << bits << " bits, " << count << " codes";
      ASSERT_TRUE(packed.intact() && unpacked.intact()) << bits << " bits, " << count << " codes";
    }
}

TEST_P(PackKernelTest, PacksAndUnpacksEveryPairOfNeighbours) {
  for (int bits = 1; bits <= 8; ++bits) {
    std::vector<uint8_t> codes;
    for (int a = 0; a < 1 << bits; ++a)
      for (int b = 0; b<1 << bits; b += bits> 6 ? 37 : 1) codes.push_back(uint8_t(a)), codes.push_back(uint8_t(b));
    codes.push_back(1);  // an odd count, so that later pairs straddle differently
    const int64_t count = int64_t(codes.size());
    std::vector<uint8_t> packed(size_t(stream_bytes(count, bits))), want(packed.size()), back(codes.size());
    reference::pack_codes(codes.data(), count, bits, want.data());
    kernel().pack(codes.data(), count, bits, packed.data());
    EXPECT_EQ(packed, want) << bits;
    kernel().unpack(packed.data(), count, bits, back.data());
    EXPECT_EQ(back, codes) << bits;
  }
}

TEST(Pack, TheTableHasOneRowAnInstructionSetAndSelectionTakesTheBest) {
  EXPECT_STREQ(select_pack_kernel(Isa::kScalar).name, "pack_reference");
#if defined(__x86_64__)
  EXPECT_STREQ(select_pack_kernel(Isa::kAvx2).name, "pack_avx2");
  EXPECT_STREQ(select_pack_kernel(Isa::kAvx512).name, "pack_avx512");
  EXPECT_STREQ(select_pack_kernel(Isa::kAvx512Vnni).name, "pack_avx512");
#endif
  EXPECT_EQ(pack_kernels().back().isa, Isa::kScalar);
}

TEST(Pack, GoldenBytesComeOutOnEveryInstructionSetAndGoBack) {
  const std::vector<GoldenCase> cases = testing::read_packed_golden();
  for (int isa = 0; isa <= int(detected_isa()); ++isa) {
    ScopedIsa forced{Isa(isa)};
    for (const GoldenCase& c : cases) {
      SCOPED_TRACE(c.name + " on " + isa_name(Isa(isa)));
      const int64_t stride = c.k + 3;
      GuardedBuffer<uint8_t> packed(c.n * c.layout.row_bytes), unpacked(c.n * stride);
      std::vector<uint8_t> in(size_t(c.n * stride), 0xee);
      for (int64_t n = 0; n < c.n; ++n) std::copy_n(c.codes.data() + n * c.k, c.k, in.data() + n * stride);
      pack({c.layout, c.n, c.k, in.data(), stride, packed.data()});
      EXPECT_EQ(packed.copy(), c.packed);
      EXPECT_TRUE(packed.intact());
      unpack({c.layout, c.n, c.k, c.packed.data(), unpacked.data(), stride});
      for (int64_t n = 0; n < c.n; ++n)
        for (int64_t k = 0; k < stride; ++k)
          ASSERT_EQ(unpacked[n * stride + k], k < c.k ? c.codes[size_t(n * c.k + k)] : 0xff) << n << ", " << k;
      EXPECT_TRUE(unpacked.intact());
    }
  }
}

TEST(Pack, UnpackUndoesPackForAnyNumberOfThreads) {
  const RowLayout layout = row_layout("uint3*333+uint7*41", 374);
  const int64_t n = 500;
  std::mt19937 rng(3);
  std::vector<uint8_t> codes(size_t(n * 374)), first;
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = uint8_t(rng() % (i % 374 < 333 ? 8 : 128));
  const int before = num_threads();
  for (int threads : {1, 2, 5}) {
    set_num_threads(threads);
    std::vector<uint8_t> packed(size_t(n * layout.row_bytes)), back(codes.size());
    pack({layout, n, 374, codes.data(), 374, packed.data()});
    unpack({layout, n, 374, packed.data(), back.data(), 374});
    EXPECT_EQ(back, codes);
    if (first.empty()) first = packed;
    EXPECT_EQ(packed, first);
  }
  set_num_threads(before);
}

TEST(Pack, ACodeOutsideItsFormatIsRefusedWithItsPlaceBeforeAnythingIsWritten) {
  const RowLayout layout = row_layout("uint4*8+ternary*8", 16);
  std::vector<uint8_t> codes(2 * 16, 1), packed(size_t(2 * layout.row_bytes), 0xcc);
  codes[16 + 11] = 3;  // fits in two bits, but ternary has three levels
  try {
    pack({layout, 2, 16, codes.data(), 16, packed.data()});
    FAIL() << "taken";
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("code 3 at [1, 11] is outside ternary"), std::string::npos) << e.what();
  }
  EXPECT_EQ(packed, std::vector<uint8_t>(packed.size(), 0xcc));
}

TEST(Pack, SizesThatContradictEachOtherAreRefusedAndEmptyOnesAreNot) {
  const RowLayout layout = row_layout("uint4", 16);
  std::vector<uint8_t> codes(32, 1), packed(16);
  EXPECT_THROW(pack({layout, 2, 15, codes.data(), 16, packed.data()}), std::invalid_argument);
  EXPECT_THROW(pack({layout, 2, 16, codes.data(), 15, packed.data()}), std::invalid_argument);
  EXPECT_THROW(pack({layout, -1, 16, codes.data(), 16, packed.data()}), std::invalid_argument);
  EXPECT_THROW(pack({layout, 2, 16, nullptr, 16, packed.data()}), std::invalid_argument);
  EXPECT_THROW(unpack({layout, 2, 16, nullptr, codes.data(), 16}), std::invalid_argument);
  EXPECT_NO_THROW(pack({layout, 0, 16, nullptr, 16, nullptr}));
  EXPECT_NO_THROW(unpack({row_layout("uint4", 0), 5, 0, nullptr, nullptr, 0}));
}

}  // namespace
}  // namespace subbyte
