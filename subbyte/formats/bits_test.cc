#include "subbyte/formats/bits.h"

#include <gtest/gtest.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <random>
#include <vector>

#include "subbyte/base/guarded_buffer_test.h"

namespace subbyte {
namespace {

// The worked examples of docs/formats.md.
template <int kBits, size_t kCount, size_t kBytes>
constexpr bool stream_is(const uint8_t (&codes)[kCount], const uint8_t (&bytes)[kBytes]) {
  uint8_t stream[kBytes] = {};
  for (size_t k = 0; k < kCount; ++k) set_code(stream, int64_t(k), kBits, codes[k]);
  for (size_t k = 0; k < kCount; ++k)
    if (get_code(stream, int64_t(k), kBits) != codes[k]) return false;
  for (size_t i = 0; i < kBytes; ++i)
    if (stream[i] != bytes[i]) return false;
  return stream_bytes(int64_t(kCount), kBits) == int64_t(kBytes);
}
static_assert(stream_is<1>({1, 0, 1, 1, 0, 0, 1, 0, 1}, {0x4d, 0x01}));
static_assert(stream_is<2>({0, 1, 2, 2, 1}, {0xa4, 0x01}));
static_assert(stream_is<3>({1, 2, 3, 4, 5, 6, 7, 0}, {0xd1, 0x58, 0x1f}));
static_assert(stream_is<4>({1, 2, 15}, {0x21, 0x0f}));
static_assert(stream_is<5>({1, 31}, {0xe1, 0x03}));   // 1 + 31 * 32
static_assert(stream_is<6>({1, 63}, {0xc1, 0x0f}));   // 1 + 63 * 64
static_assert(stream_is<7>({1, 127}, {0x81, 0x3f}));  // 1 + 127 * 128
static_assert(stream_is<8>({1, 255}, {0x01, 0xff}));

// Bit `i` of the stream, by the definition alone.
int stream_bit(const uint8_t* stream, int64_t i) { return stream[i / 8] >> (i % 8) & 1; }

TEST(Bits, EveryTupleOfCodesInAShortRowLandsOnItsOwnBits) {
  int64_t tuples = 0;
  for (int bits = 1; bits <= 8; ++bits)
    for (int count = 1; count * bits <= 16; ++count) {
      const int64_t bytes = stream_bytes(count, bits);
      for (uint32_t tuple = 0; tuple < 1u << (count * bits); ++tuple, ++tuples) {
        testing::GuardedBuffer<uint8_t> row(bytes);
        std::memset(row.data(), 0, size_t(bytes));
        for (int k = 0; k < count; ++k) set_code(row.data(), k, bits, tuple >> (k * bits) & ((1u << bits) - 1));
        uint32_t stream = 0;
        for (int64_t i = 0; i < bytes; ++i) stream |= uint32_t(row[i]) << (8 * i);
        ASSERT_EQ(stream, tuple) << bits << " bits, " << count << " codes";
        for (int k = 0; k < count; ++k)
          ASSERT_EQ(get_code(row.data(), k, bits), tuple >> (k * bits) & ((1u << bits) - 1)) << bits << ", " << k;
        ASSERT_TRUE(row.intact());
      }
    }
  EXPECT_GT(tuples, 400000);
}

TEST(Bits, WritingACodeLeavesItsNeighboursAlone) {
  std::mt19937 rng(1);
  for (int bits = 1; bits <= 8; ++bits)
    for (int count : {1, 2, 7, 8, 9, 23, 64, 65})
      for (int fill : {0x00, 0xff, 0x5a}) {
        testing::GuardedBuffer<uint8_t> row(stream_bytes(count, bits));
        for (int k = 0; k < count; ++k) {
          std::memset(row.data(), fill, size_t(row.size()));
          const uint32_t code = rng() & ((1u << bits) - 1);
          set_code(row.data(), k, bits, code);
          EXPECT_EQ(get_code(row.data(), k, bits), code);
          for (int64_t i = 0; i < row.size() * 8; ++i)
            ASSERT_TRUE((i >= k * bits && i < (k + 1) * bits) || stream_bit(row.data(), i) == (fill >> (i % 8) & 1))
                << bits << " bits, code " << k << ", stream bit " << i;
        }
        EXPECT_TRUE(row.intact());
      }
}

TEST(Bits, StreamBytesIsTheSmallestNumberOfBytesThatHoldsTheBits) {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t count = 0; count < 1000; ++count) ASSERT_EQ(stream_bytes(count, bits), (count * bits + 7) / 8);
    // Where count * bits itself would not fit in 64 bits.
    const int64_t huge = (int64_t(1) << 59) + 5;
    EXPECT_EQ(stream_bytes(huge, bits), (int64_t(1) << 56) * bits + (5 * bits + 7) / 8);
  }
}

#if defined(__linux__)
// Reads and writes at positions past 2^31 and 2^32 bits and past 2^32 bytes, in an address range whose pages are not there
// until they are touched.
TEST(Bits, PositionsBeyondTwoToThe32BytesAreExact) {
  const size_t bytes = (size_t(1) << 32) + (1 << 16);
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) GTEST_SKIP() << "the address range is not to be had";
  auto* row = static_cast<uint8_t*>(p);
  for (int bits = 1; bits <= 8; ++bits)
    for (const int64_t near_bit : {int64_t(1) << 31, int64_t(1) << 32, int64_t(1) << 35}) {
      const int64_t first = near_bit / bits - 3;
      for (int64_t k = first; k < first + 11; ++k) {
        const uint32_t code = uint32_t(uint64_t(k) * 2654435761u >> 7) & ((1u << bits) - 1);
        set_code(row, k, bits, code);
        ASSERT_EQ(get_code(row, k, bits), code);
        for (int b = 0; b < bits; ++b) ASSERT_EQ(stream_bit(row, k * bits + b), int(code >> b & 1)) << bits << " bits, " << k;
      }
    }
  munmap(p, bytes);
}
#endif

}  // namespace
}  // namespace subbyte
