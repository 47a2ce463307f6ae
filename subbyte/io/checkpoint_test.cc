#include "subbyte/io/checkpoint.h"

#include <gtest/gtest.h>

#include "subbyte/base/error.h"
#include "subbyte/io/io_test_files.h"
#include "subbyte/io/model_file.h"

namespace subbyte {
namespace {

using io_test::Bytes;
using io_test::TemporaryFolder;

SharedBytes filled(int64_t count, int start) {
  uint8_t* p = nullptr;
  SharedBytes b = SharedBytes::allocate(count, &p);
  for (int64_t i = 0; i < count; ++i) p[i] = uint8_t(start + i * 7);
  return b;
}

// Random-looking valid content for a spec.
PackedTensor packed(const std::string& name, const std::string& format, int64_t n, int64_t k, int64_t group_size, ZeroKind kind,
                    bool perm, DType scale = DType::kF16, DType zero = DType::kF32) {
  PackedTensor t;
  t.spec.name = name;
  t.spec.layout = row_layout(format, k);
  t.spec.n = n;
  t.spec.k = k;
  t.spec.group_size = group_size;
  t.spec.scale_dtype = scale;
  t.spec.zero_dtype = zero;
  t.spec.zero_kind = kind;
  t.spec.has_perm = perm;
  uint8_t* codes = nullptr;
  t.codes = SharedBytes::allocate(t.spec.codes_bytes(), &codes);
  if (codes != nullptr) std::memset(codes, 0, size_t(t.spec.codes_bytes()));
  for (int64_t r = 0; r < n; ++r)
    for (int i = 0; i < t.spec.layout.segment_count; ++i) {
      const Segment& s = t.spec.layout.segments[i];
      for (int64_t c = 0; c < s.k_count; ++c)
        set_code(codes + r * t.spec.layout.row_bytes + s.byte_begin, c, format_bits(s.format),
                 uint32_t((r * 31 + c * 17 + 5) % format_levels(s.format)));
    }
  t.scales = filled(t.spec.scales_bytes(), 3);
  t.zeros = filled(t.spec.zeros_bytes(), 5);
  if (perm) {
    uint8_t* p = nullptr;
    t.perm = SharedBytes::allocate(t.spec.perm_bytes(), &p);
    for (int64_t i = 0; i < k; ++i) {
      const auto v = int32_t(k - 1 - i);
      std::memcpy(p + 4 * i, &v, 4);
    }
  }
  return t;
}

PackedTensor with_residual(PackedTensor t, int bits) {
  t.spec.residual_bits = bits;
  uint8_t* p = nullptr;
  t.residual = SharedBytes::allocate(t.spec.residual_bytes(), &p);
  if (p != nullptr) std::memset(p, 0, size_t(t.spec.residual_bytes()));
  for (int64_t n = 0; n < t.spec.n; ++n)
    for (int64_t k = 0; k < t.spec.k; ++k)
      set_code(p + n * t.spec.residual_row_bytes(), k, bits, uint32_t(n * 13 + k * 5 + 1) & ((1u << bits) - 1));
  return t;
}

void expect_same(const SharedBytes& a, const SharedBytes& b) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_TRUE(a.size() == 0 || std::memcmp(a.data(), b.data(), size_t(a.size())) == 0);
}

void expect_same(const PackedTensor& a, const PackedTensor& b) {
  EXPECT_EQ(a.spec.name, b.spec.name);
  EXPECT_EQ(a.spec.layout.name(), b.spec.layout.name());
  EXPECT_EQ(a.spec.n, b.spec.n);
  EXPECT_EQ(a.spec.k, b.spec.k);
  EXPECT_EQ(a.spec.group_size, b.spec.group_size);
  EXPECT_EQ(a.spec.zero_kind, b.spec.zero_kind);
  EXPECT_EQ(a.spec.scale_dtype, b.spec.scale_dtype);
  if (a.spec.zero_kind != ZeroKind::kFixed) {
    EXPECT_EQ(a.spec.zero_dtype, b.spec.zero_dtype);
  }
  expect_same(a.codes, b.codes);
  expect_same(a.scales, b.scales);
  expect_same(a.zeros, b.zeros);
  expect_same(a.perm, b.perm);
  EXPECT_EQ(a.spec.residual_bits, b.spec.residual_bits);
  expect_same(a.residual, b.residual);
}

TEST(Checkpoint, GivesBackEveryFormatZeroKindTypeAndPermutation) {
  const TemporaryFolder folder;
  std::vector<LoadedTensor> tensors;
  int i = 0;
  for (const FormatInfo& f : kFormats)
    for (const ZeroKind kind : {ZeroKind::kFixed, ZeroKind::kZeros, ZeroKind::kOffsets})
      for (const int64_t k : {int64_t(0), int64_t(1), int64_t(37), int64_t(64)}) {
        ++i;
        const DType scale = i % 3 == 0 ? DType::kF32 : i % 3 == 1 ? DType::kF16 : DType::kBF16;
        tensors.push_back(packed("layer." + std::to_string(i) + ".weight", f.name, i % 4, k, 1 + i % 20, kind, i % 2 == 0,
                                 scale, i % 5 < 2 ? DType::kF16 : DType::kF32));
        if (f.bits < 8 && i % 3 == 0)
          tensors.back() = with_residual(std::get<PackedTensor>(tensors.back()), 1 + i % (8 - f.bits));
      }
  tensors.push_back(packed("mixed.weight", "uint8*32+ternary*32+uint3*5", 3, 69, 16, ZeroKind::kZeros, true));
  tensors.push_back(DenseTensor{"mixed.bias", ElementType::kBF16, {3}, filled(6, 1)});
  tensors.push_back(
      DenseTensor{"free.codes", ElementType::kU8, {3, 1}, filled(3, 1)});  // a dense tensor may be called anything
  const std::string path = folder.file("c.safetensors");
  write_checkpoint(path, tensors, {{"note", "text"}});
  const auto f = CheckpointFile::open(path);
  EXPECT_TRUE(f->native());
  EXPECT_EQ(f->file().metadata().at("note"), "text");
  EXPECT_EQ(f->file().metadata().at("format"), "pt");
  EXPECT_EQ(f->dense().size(), 2u);
  ASSERT_EQ(f->packed().size(), tensors.size() - 2);
  for (const LoadedTensor& t : tensors) {
    if (const auto* p = std::get_if<PackedTensor>(&t)) {
      ASSERT_NE(f->find_packed(p->spec.name), nullptr);
      expect_same(f->load(*f->find_packed(p->spec.name)), *p);
    }
  }
  const auto model = ModelFile::open(path);
  EXPECT_EQ(model->kind(), ModelFileKind::kCheckpoint);
  ASSERT_EQ(model->tensors().size(), tensors.size());
  const auto mixed = size_t(model->find("mixed.weight"));
  const auto row = std::get<PackedTensor>(model->load_rows(mixed, 2, 3));
  const auto all = std::get<PackedTensor>(model->load(mixed));
  for (int64_t k = 0; k < 69; ++k) EXPECT_EQ(packed_code(row.view(), 0, k), packed_code(all.view(), 2, k));
}

// A checkpoint file in memory from its parts, so that each part can be wrong.
struct Draft {
  std::string schema = R"({"version":1,"weights":{"w":{"format":"ternary","in_features":5,"group_size":4}}})";
  std::vector<TensorDeclaration> tensors = {{"w.codes", ElementType::kU8, {2, 2}}, {"w.scales", ElementType::kF16, {2, 2}}};
  std::map<std::string, Bytes> data = {{"w.codes", {0x99, 0x02, 0x55, 0x01}}};

  Bytes bytes() const {
    const TemporaryFolder folder;
    const std::string path = folder.file("draft");
    {
      SafetensorsWriter w(path, tensors, {{"subbyte", schema}});
      for (size_t i = 0; i < tensors.size(); ++i) {
        int64_t count = 0;
        tensor_bytes(tensors[i].dtype, tensors[i].shape, &count);
        const auto it = data.find(tensors[i].name);
        const Bytes b = it != data.end() ? it->second : Bytes(size_t(count));
        w.append(i, b.data(), b.size());
      }
      w.finish();
    }
    return io_test::read_file(path);
  }
  std::string error() const {
    const Bytes file = bytes();
    try {
      const auto f = CheckpointFile::from_bytes(file, "f", nullptr);
      for (const PackedSpec& s : f->packed()) f->load(s);
    } catch (const FormatError& e) {
      return e.what();
    }
    return "accepted";
  }
};

TEST(Checkpoint, AcceptsTheDraftThatTheRefusalsStartFrom) {
  EXPECT_EQ(Draft().error(), "accepted");
  Draft d;
  d.schema = R"({"version":1,"producer":{"name":"x"},"weights":{}})";
  EXPECT_EQ(d.error(), "accepted");
}

TEST(Checkpoint, RefusesSchemasThatDoNotDescribeTheFile) {
  for (const auto& [schema, expected] : std::vector<std::pair<std::string, std::string>>{
           {"", "not JSON"},
           {"[]", "not a JSON object"},
           {R"({"weights":{}})", "no version"},
           {R"({"version":2,"weights":{}})", "version is 2"},
           {R"({"version":"1","weights":{}})", "version is not a number"},
           {R"({"version":1,"weights":[]})", "weights is not an object"},
           {R"({"version":1,"weights":{"w":3}})", "is not an object"},
           {R"({"version":1,"weights":{"w":{"format":"ternary","in_features":5}}})", "lacks"},
           {R"({"version":1,"weights":{"w":{"format":"ternary","in_features":5,"group_size":4,"x":1}}})", "'x' is unknown"},
           {R"({"version":1,"weights":{"w":{"format":"uint9","in_features":5,"group_size":4}}})", "format 'uint9' is unknown"},
           {R"({"version":1,"weights":{"w":{"format":"ternary","in_features":5,"group_size":0}}})", "out of range"},
           {R"({"version":1,"weights":{"w":{"format":"ternary","in_features":-5,"group_size":4}}})", "wrong kind"},
           {R"({"version":1,"weights":{"w":{"format":"ternary","in_features":18446744073709551615,"group_size":4}}})",
            "out of range"},
           {R"({"version":1,"weights":{"w":{"format":"ternary","in_features":9,"group_size":4}}})",
            "shape is [2, 2], expected [2, 3]"},
           {R"({"version":1,"weights":{"w":{"format":"ternary","in_features":5,"group_size":5}}})",
            "shape is [2, 2], expected [2, 1]"},
           {R"({"version":1,"weights":{"w":{"format":"uint2*3+uint2*2","in_features":5,"group_size":4}}})",
            "ends inside a group"},
           {R"({"version":1,"weights":{"v":{"format":"ternary","in_features":5,"group_size":4}}})", "no tensor 'v.codes'"},
       }) {
    Draft d;
    d.schema = schema;
    EXPECT_NE(d.error().find(expected), std::string::npos) << schema << "\n  gave: " << d.error();
  }
}

TEST(Checkpoint, RefusesContentThatIsNoEncodingAndNamesTheByte) {
  Draft good;
  const auto parsed = parse_safetensors(good.bytes(), "f");
  uint64_t codes_begin = 0;
  for (const auto& e : parsed.entries)
    if (e.name == "w.codes") codes_begin = e.begin;
  for (const auto& [codes, bad_byte] : std::vector<std::pair<Bytes, int>>{
           {{0x99, 0x02, 0x57, 0x01}, 2},  // code 3 is no ternary level
           {{0x99, 0x03, 0x55, 0x01}, 1},
           {{0x99, 0x02, 0x55, 0x05}, 3},  // a spare bit
           {{0x99, 0x82, 0x55, 0x01}, 1},
       }) {
    Draft d;
    d.data["w.codes"] = codes;
    EXPECT_NE(d.error().find("'w.codes' at byte " + std::to_string(codes_begin + uint64_t(bad_byte))), std::string::npos)
        << d.error();
  }
}

TEST(Checkpoint, RefusesPermutationsThatAreNone) {
  for (const auto& [perm, expected] : std::vector<std::pair<std::array<int32_t, 5>, std::string>>{
           {{0, 1, 2, 3, 4}, "accepted"},
           {{4, 3, 2, 1, 0}, "accepted"},
           {{0, 1, 2, 3, 5}, "perm[4] is 5, outside"},
           {{0, -1, 2, 3, 4}, "perm[1] is -1, outside"},
           {{0, 1, 2, 1, 4}, "perm[3] is 1, for the second time"},
       }) {
    Draft d;
    d.tensors.push_back({"w.perm", ElementType::kI32, {5}});
    Bytes b(20);
    std::memcpy(b.data(), perm.data(), 20);
    d.data["w.perm"] = b;
    EXPECT_NE(d.error().find(expected), std::string::npos) << d.error();
  }
}

TEST(Checkpoint, RefusesPartsOfTheWrongTypeOrShape) {
  auto with = [](std::vector<TensorDeclaration> more) {
    Draft d;
    for (auto& t : more) d.tensors.push_back(std::move(t));
    return d.error();
  };
  EXPECT_EQ(with({{"w.zeros", ElementType::kBF16, {2, 2}}}), "accepted");
  EXPECT_NE(with({{"w.zeros", ElementType::kI32, {2, 2}}}).find("'w.zeros' at byte"), std::string::npos);
  EXPECT_NE(with({{"w.offsets", ElementType::kF16, {2, 3}}}).find("expected [2, 2]"), std::string::npos);
  EXPECT_NE(with({{"w.zeros", ElementType::kF16, {2, 2}}, {"w.offsets", ElementType::kF16, {2, 2}}}).find("at most one"),
            std::string::npos);
  EXPECT_NE(with({{"w.perm", ElementType::kI64, {5}}}).find("expected I32"), std::string::npos);
  EXPECT_NE(with({{"w", ElementType::kF32, {2, 5}}}).find("dense and packed"), std::string::npos);
  Draft d;
  d.tensors[0] = {"w.codes", ElementType::kI8, {2, 2}};
  EXPECT_NE(d.error().find("expected U8"), std::string::npos);
  d = Draft();
  d.tensors[1] = {"w.scales", ElementType::kF64, {2, 2}};
  EXPECT_NE(d.error().find("expected F32, F16 or BF16"), std::string::npos);
  d = Draft();
  d.tensors.pop_back();
  EXPECT_NE(d.error().find("no tensor 'w.scales'"), std::string::npos);
}

TEST(Checkpoint, ResidualPlanesAreCheckedAsFarAsTheyCanBeWrongAndWeightsWithoutAreAsBefore) {
  auto with = [](const std::string& bits, std::vector<TensorDeclaration> more, const Bytes& content = {}) {
    Draft d;
    d.schema =
        R"({"version":1,"weights":{"w":{"format":"ternary","in_features":5,"group_size":4,"residual_bits":)" + bits + "}}}";
    for (auto& t : more) d.tensors.push_back(std::move(t));
    if (!content.empty()) d.data["w.residual"] = content;
    return d.error();
  };
  const TensorDeclaration plane{"w.residual", ElementType::kU8, {2, 4}};
  EXPECT_EQ(with("6", {plane}), "accepted");
  EXPECT_EQ(with("0", {}), "accepted");
  EXPECT_EQ(with("0", {plane}), "accepted");  // then it is a tensor like any other
  EXPECT_EQ(with("6", {plane}, {0xff, 0xff, 0xff, 0x3f, 0xff, 0xff, 0xff, 0x3f}), "accepted");
  EXPECT_NE(with("6", {plane}, {0, 0, 0, 0, 0, 0, 0, 0x40}).find("spare bits"), std::string::npos);
  EXPECT_NE(with("7", {plane}).find("at most 8 together"), std::string::npos);
  EXPECT_NE(with("6", {}).find("no tensor 'w.residual'"), std::string::npos);
  EXPECT_NE(with("4", {plane}).find("shape is [2, 4], expected [2, 3]"), std::string::npos);
  EXPECT_NE(with("6", {{"w.residual", ElementType::kI8, {2, 4}}}).find("expected U8"), std::string::npos);
  EXPECT_NE(with("\"6\"", {plane}).find("wrong kind"), std::string::npos);
}

TEST(Checkpoint, TiedNamesFindTheTensorThatIsStored) {
  const TemporaryFolder folder;
  const std::string path = folder.file("c");
  const PackedTensor w = packed("embed.weight", "uint4", 3, 8, 4, ZeroKind::kOffsets, false);
  write_checkpoint(path, {w, DenseTensor{"norm", ElementType::kF32, {2}, filled(8, 1)}}, {},
                   {{"head.weight", "embed.weight"}, {"norm2", "norm"}});
  const auto f = CheckpointFile::open(path);
  ASSERT_EQ(f->tied().size(), 2u);
  EXPECT_EQ(f->stored_name("head.weight"), "embed.weight");
  EXPECT_EQ(f->stored_name("norm"), "norm");
  ASSERT_NE(f->find_packed("head.weight"), nullptr);
  EXPECT_EQ(f->find_packed("head.weight"), f->find_packed("embed.weight"));
  EXPECT_EQ(f->find_packed("norm2"), nullptr);
  const auto model = ModelFile::open(path);
  EXPECT_EQ(model->tensors().size(), 2u);
  EXPECT_EQ(model->tied().at("norm2"), "norm");
  ASSERT_GE(model->find("head.weight"), 0);
  EXPECT_EQ(model->find("head.weight"), model->find("embed.weight"));
  EXPECT_EQ(model->find("norm2"), model->find("norm"));
  EXPECT_EQ(model->find("other"), -1);
}

TEST(Checkpoint, RefusesTiedNamesThatDoNotDescribeTheFile) {
  const auto error = [](const std::string& tied) {
    Draft d;
    d.schema = R"({"version":1,"weights":{"w":{"format":"ternary","in_features":5,"group_size":4}},"tied":)" + tied + "}";
    return d.error();
  };
  EXPECT_EQ(error("{}"), "accepted");
  EXPECT_EQ(error(R"({"v":"w"})"), "accepted");
  EXPECT_NE(error("[]").find("tied is not an object of names"), std::string::npos);
  EXPECT_NE(error(R"({"v":["w"]})").find("tied is not an object of names"), std::string::npos);
  EXPECT_NE(error(R"({"v":"u"})").find("'v' at byte 8: is tied to 'u', which the file does not hold"), std::string::npos);
  EXPECT_NE(error(R"({"u":"v","v":"w"})").find("is tied to 'v', which the file does not hold"), std::string::npos);
  EXPECT_NE(error(R"({"w":"w"})").find("is tied to 'w', but stored too"), std::string::npos);
  EXPECT_NE(error(R"({"v":"w.codes"})").find("does not hold"), std::string::npos);  // a part is no weight
}

TEST(Checkpoint, ErrorsOfAFileWithoutTensorsNameTheFile) {
  const Bytes bytes = io_test::safetensors_file(R"({"__metadata__":{"subbyte":"{\"version\":2}"}})", 0);
  try {
    CheckpointFile::from_bytes(bytes, "empty.safetensors", nullptr);
    ADD_FAILURE() << "accepted";
  } catch (const FormatError& e) {
    EXPECT_EQ(std::string(e.what()).rfind("empty.safetensors: metadata 'subbyte'", 0), 0u) << e.what();
  }
}

TEST(CheckpointWriter, RefusesContradictions) {
  const TemporaryFolder folder;
  const std::string path = folder.file("c");
  const PackedSpec spec = packed("w", "uint4", 2, 8, 4, ZeroKind::kFixed, false).spec;
  using D = std::vector<TensorDeclaration>;
  EXPECT_THROW(CheckpointWriter(path, D{{"w", ElementType::kU8, {1}}}, {spec}), std::invalid_argument);
  EXPECT_THROW(CheckpointWriter(path, D{{"w.codes", ElementType::kU8, {1}}}, {spec}), std::invalid_argument);
  EXPECT_THROW(CheckpointWriter(path, D{}, {spec, spec}), std::invalid_argument);
  EXPECT_THROW(CheckpointWriter(path, D{}, {spec}, {{"subbyte", "x"}}), std::invalid_argument);
  PackedSpec other = spec;
  other.k = 9;
  EXPECT_THROW(CheckpointWriter(path, D{}, {other}), std::invalid_argument);
  other = spec;
  other.residual_bits = 5;
  EXPECT_THROW(CheckpointWriter(path, D{}, {other}), std::invalid_argument);
  EXPECT_THROW(CheckpointWriter(path, D{}, {spec}, {}, {{"v", "u"}}), std::invalid_argument);
  EXPECT_THROW(CheckpointWriter(path, D{}, {spec}, {}, {{"w", "w"}}), std::invalid_argument);
  EXPECT_THROW(CheckpointWriter(path, D{}, {spec}, {}, {{"v", "w.codes"}}), std::invalid_argument);
  CheckpointWriter w(path, {}, {spec});
  EXPECT_THROW(w.append_packed(0, CheckpointWriter::Part::kZeros, "", 0), std::invalid_argument);
  EXPECT_THROW(w.append_packed(1, CheckpointWriter::Part::kCodes, "", 0), std::invalid_argument);
}

}  // namespace
}  // namespace subbyte
