#include "subbyte/io/gguf.h"

#include <gtest/gtest.h>

#include <bit>

#include "subbyte/base/error.h"
#include "subbyte/io/io_test_files.h"

namespace subbyte {
namespace {

using io_test::Bytes;
using io_test::ByteWriter;
using io_test::gguf_file;
using io_test::GgufTestTensor;

constexpr uint16_t kHalf = 0x3800, kMinusTwo = 0xc000, kQuarter = 0x3400;  // float16 0.5, -2, 0.25

std::string error_of(const Bytes& file) {
  try {
    GgufFile::from_bytes(file, "f", nullptr);
  } catch (const FormatError& e) {
    return e.what();
  }
  return "accepted";
}

PackedTensor load_packed(const GgufFile& f, const char* name) { return std::get<PackedTensor>(f.load(*f.find(name))); }

TEST(Gguf, BlocksOfQ4_0GiveTheValuesOfThePublishedRule) {
  ByteWriter block;
  for (const uint16_t d : {kHalf, kMinusTwo}) {
    block.put(d);
    for (int j = 0; j < 16; ++j) block.put(uint8_t(j | (15 - j) << 4));
  }
  const Bytes file = gguf_file({{"w", {32, 2}, 2, block.bytes}});
  const auto f = GgufFile::from_bytes(file, "f", nullptr);
  const PackedTensor t = load_packed(*f, "w");
  EXPECT_EQ(t.spec.n, 2);
  EXPECT_EQ(t.spec.k, 32);
  EXPECT_EQ(t.spec.layout.name(), "uint4");
  EXPECT_EQ(t.spec.group_size, 32);
  const PackedMatrix w = t.view();
  for (int n = 0; n < 2; ++n) {
    const float d = n == 0 ? 0.5f : -2.0f;
    for (int k = 0; k < 32; ++k) {
      const int q = k < 16 ? k : 15 - (k - 16);
      EXPECT_EQ(std::bit_cast<uint32_t>(packed_value(w, n, k)), std::bit_cast<uint32_t>(d * float(q - 8))) << n << " " << k;
    }
  }
  EXPECT_EQ(std::bit_cast<uint32_t>(packed_value(w, 1, 8)), 0x80000000u);  // -2 * 0
}

TEST(Gguf, BlocksOfQ4_1GiveTheValuesOfThePublishedRule) {
  ByteWriter block;
  block.put(kHalf).put(kMinusTwo);
  for (int j = 0; j < 16; ++j) block.put(uint8_t(j | (15 - j) << 4));
  const Bytes file = gguf_file({{"w", {32}, 3, block.bytes}});
  const auto f = GgufFile::from_bytes(file, "f", nullptr);
  const PackedTensor t = load_packed(*f, "w");
  EXPECT_EQ(t.spec.n, 1);
  EXPECT_EQ(t.spec.zero_kind, ZeroKind::kOffsets);
  for (int k = 0; k < 32; ++k) {
    const int q = k < 16 ? k : 15 - (k - 16);
    EXPECT_EQ(packed_value(t.view(), 0, k), 0.5f * float(q) - 2.0f) << k;
  }
}

TEST(Gguf, BlocksOfQ8_0GiveTheValuesOfThePublishedRule) {
  ByteWriter block;
  block.put(kQuarter);
  for (int j = 0; j < 32; ++j) block.put(int8_t(j == 0 ? -128 : j == 1 ? 127 : j - 16));
  const Bytes file = gguf_file({{"w", {32, 1}, 8, block.bytes}});
  const auto f = GgufFile::from_bytes(file, "f", nullptr);
  const PackedTensor t = load_packed(*f, "w");
  EXPECT_EQ(t.spec.layout.name(), "uint8");
  for (int k = 0; k < 32; ++k)
    EXPECT_EQ(packed_value(t.view(), 0, k), 0.25f * float(k == 0 ? -128 : k == 1 ? 127 : k - 16)) << k;
}

TEST(Gguf, RowRangesConvertToTheSameBytesAsTheWholeTensor) {
  for (const uint32_t type : {2u, 3u, 8u}) {
    const int block_bytes = gguf_type_info(type).block_bytes;
    Bytes data(size_t(block_bytes) * 3 * 5);
    for (size_t i = 0; i < data.size(); ++i) data[i] = uint8_t(i * 37 + 11);
    const Bytes file = gguf_file({{"w", {96, 5}, type, data}});
    const auto f = GgufFile::from_bytes(file, "f", nullptr);
    const PackedTensor all = load_packed(*f, "w");
    for (int64_t n = 0; n < 5; ++n) {
      std::vector<uint8_t> codes(size_t(all.spec.layout.row_bytes));
      uint16_t scales[3], offsets[3];
      f->convert_rows(*f->find("w"), n, n + 1, codes.data(), scales, offsets);
      EXPECT_EQ(0, std::memcmp(codes.data(), all.codes.data() + n * all.spec.layout.row_bytes, codes.size()));
      EXPECT_EQ(0, std::memcmp(scales, all.scales.data() + n * 6, 6));
      if (type == 3) {
        EXPECT_EQ(0, std::memcmp(offsets, all.zeros.data() + n * 6, 6));
      }
    }
  }
}

Bytes all_values(uint64_t* count) {
  ByteWriter v;
  v.string("u8").put<uint32_t>(0).put<uint8_t>(200);
  v.string("i8").put<uint32_t>(1).put<int8_t>(-5);
  v.string("u16").put<uint32_t>(2).put<uint16_t>(60000);
  v.string("i16").put<uint32_t>(3).put<int16_t>(-30000);
  v.string("u32").put<uint32_t>(4).put<uint32_t>(4000000000u);
  v.string("i32").put<uint32_t>(5).put<int32_t>(-2000000000);
  v.string("f32").put<uint32_t>(6).put<float>(1.5f);
  v.string("bool").put<uint32_t>(7).put<uint8_t>(1);
  v.string("string").put<uint32_t>(8).string("text");
  v.string("strings").put<uint32_t>(9).put<uint32_t>(8).put<uint64_t>(2).string("one").string("");
  v.string("ints").put<uint32_t>(9).put<uint32_t>(5).put<uint64_t>(2).put<int32_t>(-1).put<int32_t>(7);
  v.string("bools").put<uint32_t>(9).put<uint32_t>(7).put<uint64_t>(2).put<uint8_t>(0).put<uint8_t>(1);
  v.string("u64").put<uint32_t>(10).put<uint64_t>(UINT64_MAX);
  v.string("i64").put<uint32_t>(11).put<int64_t>(INT64_MIN);
  v.string("f64").put<uint32_t>(12).put<double>(-0.25);
  *count = 15;
  return v.bytes;
}

TEST(Gguf, ReadsEveryKindOfValueInVersions2And3) {
  uint64_t count = 0;
  const Bytes values = all_values(&count);
  for (const uint32_t version : {2u, 3u}) {
    const Bytes file = gguf_file({}, values, count, version);
    const auto f = GgufFile::from_bytes(file, "f", nullptr);
    EXPECT_EQ(f->version(), int(version));
    auto at = [&](const char* key) { return f->find_value(key)->value; };
    EXPECT_EQ(std::get<uint64_t>(at("u8")), 200u);
    EXPECT_EQ(std::get<int64_t>(at("i8")), -5);
    EXPECT_EQ(std::get<uint64_t>(at("u16")), 60000u);
    EXPECT_EQ(std::get<int64_t>(at("i16")), -30000);
    EXPECT_EQ(std::get<uint64_t>(at("u32")), 4000000000u);
    EXPECT_EQ(std::get<int64_t>(at("i32")), -2000000000);
    EXPECT_EQ(std::get<double>(at("f32")), 1.5);
    EXPECT_EQ(std::get<bool>(at("bool")), true);
    EXPECT_EQ(std::get<std::string_view>(at("string")), "text");
    EXPECT_EQ(std::get<uint64_t>(at("u64")), UINT64_MAX);
    EXPECT_EQ(std::get<int64_t>(at("i64")), INT64_MIN);
    EXPECT_EQ(std::get<double>(at("f64")), -0.25);
    std::vector<std::string> strings;
    std::get<GgufArray>(at("strings")).for_each_string([&](std::string_view s) {
      strings.emplace_back(s);
      return true;
    });
    EXPECT_EQ(strings, (std::vector<std::string>{"one", ""}));
    const auto ints = std::get<GgufArray>(at("ints"));
    EXPECT_EQ(ints.integer(0), -1);
    EXPECT_EQ(ints.integer(1), 7);
    EXPECT_THROW(ints.integer(2), std::invalid_argument);
    EXPECT_EQ(std::get<GgufArray>(at("bools")).integer(1), 1);
    EXPECT_EQ(f->find_value("absent"), nullptr);
  }
}

TEST(Gguf, ReadsDenseTensorsWithTheirDimensionsTurnedRound) {
  Bytes data(24);
  for (size_t i = 0; i < data.size(); ++i) data[i] = uint8_t(i);
  const Bytes file = gguf_file({{"a", {3, 2}, 0, data}, {"b", {12}, 30, data}, {"s", {}, 0, Bytes(4, 1)}});
  const auto f = GgufFile::from_bytes(file, "f", nullptr);
  const auto a = std::get<DenseTensor>(f->load(*f->find("a")));
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(a.dtype, ElementType::kF32);
  EXPECT_EQ(0, std::memcmp(a.bytes.data(), data.data(), 24));
  EXPECT_EQ(std::get<DenseTensor>(f->load(*f->find("b"))).dtype, ElementType::kBF16);
  EXPECT_EQ(std::get<DenseTensor>(f->load(*f->find("s"))).bytes.size(), 4);
}

TEST(Gguf, ListsTypesItCannotConvertAndRefusesToLoadThem) {
  const Bytes file = gguf_file({{"k", {256}, 12, Bytes(144)}, {"future", {5}, 77, Bytes(9)}});
  const auto f = GgufFile::from_bytes(file, "f", nullptr);
  EXPECT_EQ(f->find("k")->bytes, 144u);
  EXPECT_STREQ(f->find("k")->type.name, "Q4_K");
  EXPECT_EQ(f->find("future")->bytes, 0u);
  try {
    f->load(*f->find("k"));
    FAIL();
  } catch (const FormatError& e) {
    EXPECT_NE(std::string(e.what()).find("tensor 'k'"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("type 12 (Q4_K)"), std::string::npos) << e.what();
  }
  EXPECT_THROW(f->load(*f->find("future")), FormatError);
}

TEST(Gguf, RefusesWhatContradictsTheFormatAndNamesThePart) {
  auto one = [](GgufTestTensor t) { return gguf_file({std::move(t)}); };
  auto value = [](const ByteWriter& v, uint64_t count = 1) { return gguf_file({}, v.bytes, count); };
  auto patched = [&](size_t at, uint64_t v, size_t bytes) {
    Bytes b = one({"w", {32}, 2, Bytes(18)});
    std::memcpy(b.data() + at, &v, bytes);
    return b;
  };
  struct Case {
    Bytes file;
    const char* expected;
  };
  const Case cases[] = {
      {{}, "magic needs 4 bytes"},
      {patched(0, 0x12345678, 4), "begin with 'GGUF'"},
      {patched(4, 1, 4), "version is 1"},
      {patched(4, 0x03000000, 4), "big-endian"},
      {patched(8, 1u << 30, 8), "tensors do not fit"},
      {patched(8, UINT64_MAX, 8), "tensors do not fit"},
      {patched(16, UINT64_MAX, 8), "key-value pairs do not fit"},
      {patched(24, UINT64_MAX, 8), "expected at most 64"},
      {patched(24, 1000, 8), "expected at most 64"},
      {patched(33, 5, 4), "5 dimensions"},
      {patched(37, 33, 8), "expected a multiple of 32"},
      {patched(37, 64, 8), "beyond the"},
      {patched(37, uint64_t(1) << 62, 8), "overflows"},
      {patched(49, 33, 8), "not a multiple of the alignment"},
      {patched(49, uint64_t(1) << 63, 8), "beyond the"},
      {one({"", {32}, 2, Bytes(18)}), "name is empty"},
      {one({"w", {uint64_t(1) << 33, uint64_t(1) << 33}, 0, {}}), "overflows"},
      {gguf_file({{"w", {4}, 0, Bytes(16)}, {"w", {4}, 0, Bytes(16)}}), "described twice"},
      {value(ByteWriter().string("k").put<uint32_t>(13).put<uint32_t>(0)), "value type 13 is unknown"},
      {value(ByteWriter().string("k").put<uint32_t>(7).put<uint8_t>(2)), "bool is 2"},
      {value(ByteWriter().string("k").put<uint32_t>(9).put<uint32_t>(9).put<uint64_t>(0)), "arrays of type 9"},
      {value(ByteWriter().string("k").put<uint32_t>(9).put<uint32_t>(12).put<uint64_t>(uint64_t(1) << 61)), "does not fit"},
      {value(ByteWriter().string("k").put<uint32_t>(9).put<uint32_t>(8).put<uint64_t>(UINT64_MAX)), "string in array"},
      {value(ByteWriter().string("k").put<uint32_t>(0).put<uint8_t>(2).string("k").put<uint32_t>(0).put<uint8_t>(2), 2),
       "given twice"},
      {value(ByteWriter().string("general.alignment").put<uint32_t>(4).put<uint32_t>(0)), "power of two"},
      {value(ByteWriter().string("general.alignment").put<uint32_t>(4).put<uint32_t>(24)), "power of two"},
      {value(ByteWriter().string("general.alignment").put<uint32_t>(8).string("32")), "not of type u32"},
  };
  int i = 0;
  for (const Case& c : cases) {
    const std::string error = error_of(c.file);
    EXPECT_NE(error.find(c.expected), std::string::npos) << "case " << i << " expected '" << c.expected << "', gave: " << error;
    ++i;
  }
}

TEST(Gguf, RefusesTensorsThatOverlap) {
  Bytes file = gguf_file({{"a", {16}, 0, Bytes(64)}, {"b", {16}, 0, Bytes(64)}});
  EXPECT_EQ(error_of(file), "accepted");
  const size_t description = 8 + 1 + 4 + 8 + 4 + 8;
  const size_t offset_of_b = 24 + 2 * description - 8;
  ASSERT_EQ(file[offset_of_b], 64);
  file[offset_of_b] = 32;
  EXPECT_NE(error_of(file).find("overlaps that of tensor 'a'"), std::string::npos) << error_of(file);
}

TEST(Gguf, HonoursTheFilesOwnAlignment) {
  ByteWriter v;
  v.string("general.alignment").put<uint32_t>(4).put<uint32_t>(8);
  const Bytes file = gguf_file({{"a", {1}, 0, Bytes(4, 1)}, {"b", {1}, 0, Bytes(4, 2)}}, v.bytes, 1, 3, 8);
  const auto f = GgufFile::from_bytes(file, "f", nullptr);
  EXPECT_EQ(f->find("b")->begin - f->find("a")->begin, 8u);
  EXPECT_EQ(f->bytes_of(*f->find("b"))[0], 2);
}

}  // namespace
}  // namespace subbyte
