#include "subbyte/io/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "subbyte/base/error.h"
#include "subbyte/io/io_test_files.h"
#include "subbyte/io/json_events.h"
#include "subbyte/io/model_file.h"

namespace subbyte {
namespace {

using io_test::Bytes;
using io_test::safetensors_file;
using io_test::TemporaryFolder;

std::string error_of(const Bytes& file) {
  try {
    parse_safetensors(file, "f");
  } catch (const FormatError& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Safetensors, ReadsEveryElementTypeOfAHandWrittenFile) {
  std::string header = "{\"__metadata__\":{\"format\":\"pt\"}";
  size_t offset = 0;
  for (int t = 0; t < kElementTypeCount; ++t) {
    const auto type = ElementType(t);
    const auto end = offset + size_t(element_type_bytes(type)) * 6;
    header += std::string(",\"t") + std::to_string(t) + "\":{\"dtype\":\"" + element_type_name(type) +
              "\",\"shape\":[2,3],\"data_offsets\":[" + std::to_string(offset) + "," + std::to_string(end) + "]}";
    offset = end;
  }
  const Bytes file = safetensors_file(header + "}   ", offset);
  const auto f = SafetensorsFile::from_bytes(file, "f", nullptr);
  ASSERT_EQ(f->entries().size(), size_t(kElementTypeCount));
  EXPECT_EQ(f->metadata().at("format"), "pt");
  size_t at = 0;
  for (int t = 0; t < kElementTypeCount; ++t) {
    const SafetensorsEntry* e = f->find("t" + std::to_string(t));
    ASSERT_NE(e, nullptr);
    EXPECT_EQ(e->dtype, ElementType(t));
    const DenseTensor d = f->load(*e);
    EXPECT_EQ(d.shape, (std::vector<int64_t>{2, 3}));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(d.bytes.data()) % size_t(element_type_bytes(d.dtype)), 0u);
    for (int64_t i = 0; i < d.bytes.size(); ++i) EXPECT_EQ(d.bytes.data()[i], uint8_t(at++));
  }
}

TEST(Safetensors, AcceptsScalarsEmptyTensorsAndFilesWithoutTensors) {
  EXPECT_EQ(error_of(safetensors_file("{}", 0)), "accepted");
  EXPECT_EQ(error_of(safetensors_file(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                                      R"("e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]},)"
                                      R"("z":{"dtype":"F32","shape":[7,0],"data_offsets":[4,4]}})",
                                      4)),
            "accepted");
}

TEST(Safetensors, RefusesWhatContradictsTheFormatAndNamesTensorAndByte) {
  struct Case {
    const char* header;
    size_t data_bytes;
    const char* expected;
  };
  const Case cases[] = {
      {"[]", 0, "does not begin with '{'"},
      {" {}", 0, "does not begin with '{'"},
      {"{", 0, "not JSON"},
      {"{}x", 0, "not JSON"},
      {"{\"a\xff\":1}", 0, "not JSON"},
      {R"({"a":1})", 0, "tensor 'a' at byte"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4,
       "duplicate key 'a'"},
      {R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, "duplicate key 'dtype'"},
      {R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4, "dtype 'F33' is unknown"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4, "unknown field 'x'"},
      {R"({"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}})", 4, "shape is not an array"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "shape is not an array of sizes"},
      {R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, "shape is not an array of sizes"},
      {R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", 4, "array inside an array"},
      {R"({"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}})", 4, "'shape' is an object"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "lacks"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})", 4, "not an array of two"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", 4, "lacks"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "do not hold the 8 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "do not hold"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,5]}})", 4, "beyond the data"},
      {R"({"a":{"dtype":"F64","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0, "overflows"},
      {R"({"a":{"dtype":"F64","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}})", 0, "overflows"},
      {R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0]}})", 0, "shape is not"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})", 5,
       "gap"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", 3,
       "overlaps"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})", 3, "gap"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", 3, "the file has"},
      {R"({"__metadata__":{"a":1}})", 0, "not an object of strings"},
      {R"({"__metadata__":{"a":["x"]}})", 0, "not an object of strings"},
      {R"({"__metadata__":"a"})", 0, "not an object of strings"},
      {R"({"a":{"b":{"c":{"d":1}}}})", 0, "'b' is an object"},
  };
  for (const Case& c : cases) {
    const std::string error = error_of(safetensors_file(c.header, c.data_bytes));
    EXPECT_NE(error.find(c.expected), std::string::npos) << c.header << "\n  gave: " << error;
    EXPECT_NE(error.find(" at byte "), std::string::npos) << error;
  }
}

TEST(Safetensors, RefusesHeadersThatAreTooLongOrCutShort) {
  EXPECT_NE(error_of({}).find("header length"), std::string::npos);
  EXPECT_NE(error_of({1, 0, 0}).find("header length"), std::string::npos);
  EXPECT_NE(error_of({255, 255, 255, 255, 255, 255, 255, 255}).find("is above"), std::string::npos);
  EXPECT_NE(error_of({1, 0xe1, 0xf5, 5, 0, 0, 0, 0, '{'}).find("is above"), std::string::npos);
  EXPECT_NE(error_of({3, 0, 0, 0, 0, 0, 0, 0, '{', '}'}).find("header needs 3 bytes"), std::string::npos);
}

TEST(Safetensors, OffsetOfAnErrorLiesInTheOffendingPartOfTheHeader) {
  const std::string header = R"({"aaaa":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"XX"}})";
  try {
    parse_safetensors(safetensors_file(header, 4), "f");
    FAIL();
  } catch (const FormatError& e) {
    const auto at = 8 + header.find("XX");
    EXPECT_GE(e.offset_bytes(), at);
    EXPECT_LE(e.offset_bytes(), at + 4);
    EXPECT_EQ(e.where(), "f: tensor 'b'");
  }
}

TEST(SafetensorsWriter, GivesBackWhatWasAppendedInAnyChunkingAndInterleaving) {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.safetensors");
  const std::vector<TensorDeclaration> tensors = {{"bytes", ElementType::kU8, {5}},
                                                  {"wide \"quoted\" \xc3\xa4", ElementType::kF64, {2}},
                                                  {"half", ElementType::kF16, {3}},
                                                  {"none", ElementType::kF32, {0}}};
  Bytes data[4] = {{1, 2, 3, 4, 5}, Bytes(16, 7), {9, 8, 7, 6, 5, 4}, {}};
  {
    SafetensorsWriter w(path, tensors, {{"k", "v\n"}});
    w.append(0, data[0].data(), 2);
    w.append(2, data[2].data(), 1);
    w.append(0, data[0].data() + 2, 3);
    w.append(1, data[1].data(), 16);
    w.append(2, data[2].data() + 1, 5);
    EXPECT_FALSE(std::filesystem::exists(path));
    w.finish();
  }
  const auto f = SafetensorsFile::open(path);
  EXPECT_EQ(f->metadata().at("k"), "v\n");
  for (int i = 0; i < 4; ++i) {
    const SafetensorsEntry* e = f->find(tensors[size_t(i)].name);
    ASSERT_NE(e, nullptr);
    EXPECT_EQ(e->begin % size_t(element_type_bytes(e->dtype)), 0u) << e->name;
    const auto got = f->bytes_of(*e);
    EXPECT_EQ(Bytes(got.begin(), got.end()), data[i]);
  }
  EXPECT_EQ(f->entries().front().begin % 64, 0u);
  // One chunk gives the same file.
  const std::string again = folder.file("b.safetensors");
  {
    SafetensorsWriter w(again, tensors, {{"k", "v\n"}});
    for (size_t i = 0; i < 4; ++i) w.append(i, data[i].data(), data[i].size());
    w.finish();
  }
  EXPECT_EQ(io_test::read_file(path), io_test::read_file(again));
}

TEST(SafetensorsWriter, LeavesNothingAndKeepsTheOldFileWhenAbandoned) {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.safetensors");
  io_test::write_file(path, {'o', 'l', 'd'});
  {
    SafetensorsWriter w(path, {{"a", ElementType::kU8, {4}}}, {});
    const uint8_t data[4] = {1, 2, 3, 4};
    w.append(0, data, 3);
    EXPECT_THROW(w.append(0, data, 2), std::invalid_argument);
    EXPECT_THROW(w.finish(), std::invalid_argument);
  }
  EXPECT_EQ(io_test::read_file(path), (Bytes{'o', 'l', 'd'}));
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) files += entry.exists();
  EXPECT_EQ(files, 1);
}

TEST(SafetensorsWriter, RefusesNamesAndShapesTheFormatCannotHold) {
  const TemporaryFolder folder;
  const std::string path = folder.file("a");
  using D = std::vector<TensorDeclaration>;
  EXPECT_THROW(SafetensorsWriter(path, D{{"", ElementType::kU8, {}}}, {}), std::invalid_argument);
  EXPECT_THROW(SafetensorsWriter(path, D{{"__metadata__", ElementType::kU8, {}}}, {}), std::invalid_argument);
  EXPECT_THROW(SafetensorsWriter(path, D{{"a", ElementType::kU8, {}}, {"a", ElementType::kU8, {}}}, {}), std::invalid_argument);
  EXPECT_THROW(SafetensorsWriter(path, D{{"\xff", ElementType::kU8, {}}}, {}), std::invalid_argument);
  EXPECT_THROW(SafetensorsWriter(path, D{{"a", ElementType::kU8, {-1}}}, {}), std::invalid_argument);
  EXPECT_THROW(SafetensorsWriter(path, D{{"a", ElementType::kF64, {INT64_MAX}}}, {}), std::invalid_argument);
  EXPECT_THROW(SafetensorsWriter(folder.file("no/such/folder"), D{}, {}), IoError);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

void write_one(const std::string& path, const std::string& name) {
  SafetensorsWriter w(path, {{name, ElementType::kU8, {1}}}, {{"format", "pt"}});
  const uint8_t v = uint8_t(name[0]);
  w.append(0, &v, 1);
  w.finish();
}

TEST(SafetensorsShards, AreReadAsOneCheckpointFromIndexOrFolder) {
  const TemporaryFolder folder;
  write_one(folder.file("m-1.safetensors"), "a");
  write_one(folder.file("m-2.safetensors"), "b");
  const std::string index = folder.file("model.safetensors.index.json");
  const std::string text = R"({"metadata":{"total_size":2},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})";
  io_test::write_file(index, Bytes(text.begin(), text.end()));
  for (const std::string& path : {index, folder.path()}) {
    const auto f = SafetensorsFile::open(path);
    ASSERT_EQ(f->entries().size(), 2u);
    EXPECT_EQ(f->bytes_of(*f->find("a"))[0], 'a');
    EXPECT_EQ(f->bytes_of(*f->find("b"))[0], 'b');
  }
}

TEST(SafetensorsShards, RefuseAnIndexThatDisagreesWithTheFilesOrReachesOutOfTheFolder) {
  const TemporaryFolder folder;
  write_one(folder.file("m-1.safetensors"), "a");
  write_one(folder.file("m-2.safetensors"), "b");
  write_one(folder.file("m-3.safetensors"), "a");
  const std::string index = folder.file("model.safetensors.index.json");
  for (const char* text : {
           R"({"weight_map":{"a":"m-2.safetensors","b":"m-1.safetensors"}})",
           R"({"weight_map":{"a":"m-1.safetensors","b":"m-1.safetensors"}})",
           R"({"weight_map":{"a":"m-1.safetensors","x":"m-2.safetensors"}})",
           R"({"weight_map":{"a":"m-1.safetensors","b":"m-3.safetensors"}})",
           R"({"weight_map":{"a":"../m-1.safetensors"}})",
           R"({"weight_map":{"a":"/etc/passwd"}})",
           R"({"weight_map":{"a":1}})",
           R"({"weight_map":[]})",
           R"({})",
           R"([])",
       }) {
    io_test::write_file(index, Bytes(text, text + std::strlen(text)));
    EXPECT_THROW(SafetensorsFile::open(index), FormatError) << text;
  }
}

TEST(MappedFile, MissingFilesAndFoldersAreIoErrors) {
  const TemporaryFolder folder;
  EXPECT_THROW(MappedFile(folder.file("none")), IoError);
  EXPECT_THROW(MappedFile(folder.path()), IoError);
  io_test::write_file(folder.file("empty"), {});
  EXPECT_TRUE(MappedFile(folder.file("empty")).bytes().empty());
  EXPECT_THROW(ModelFile::open(folder.file("empty")), FormatError);
}

}  // namespace
}  // namespace subbyte
