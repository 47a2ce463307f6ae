// Replays the fuzz corpus, and damages every small file in it: cut at every length, every single bit flipped.
#include <gtest/gtest.h>

#include <algorithm>

#include "subbyte/base/testdata_test.h"
#include "subbyte/io/io_test_files.h"
#include "subbyte/io/parse_whole_file.h"

namespace subbyte {
namespace {

using io_test::Bytes;
using Parse = bool (*)(std::span<const uint8_t>);

std::vector<Bytes> corpus(const std::string& target) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(testing::testdata_dir() + "/fuzz/" + target))
    names.push_back(entry.path().string());
  std::sort(names.begin(), names.end());
  std::vector<Bytes> out;
  for (const std::string& name : names) out.push_back(io_test::read_file(name));
  return out;
}

// The copy has exactly the input's size, so that AddressSanitizer sees a read past its end.
bool parse_copy(Parse parse, const Bytes& bytes, size_t size) {
  const std::unique_ptr<uint8_t[]> exact(new uint8_t[size]);
  if (size > 0) std::memcpy(exact.get(), bytes.data(), size);
  return parse({exact.get(), size});
}

void damage(const std::string& target, Parse parse, bool cut_tail_is_refused) {
  int accepted = 0;
  for (Bytes file : corpus(target)) {
    if (!parse_copy(parse, file, file.size())) continue;  // a seed kept because it is wrong: the replay was the test
    ++accepted;
    for (size_t size = 0; size < file.size(); ++size) {
      const bool accepted_cut = parse_copy(parse, file, size);
      EXPECT_FALSE(accepted_cut && cut_tail_is_refused) << target << " cut to " << size << " of " << file.size() << " bytes";
    }
    for (size_t bit = 0; bit < file.size() * 8; ++bit) {
      file[bit / 8] = uint8_t(file[bit / 8] ^ (1u << (bit % 8)));
      parse_copy(parse, file, file.size());
      file[bit / 8] = uint8_t(file[bit / 8] ^ (1u << (bit % 8)));
    }
  }
  EXPECT_GE(accepted, 2) << "the corpus of " << target << " holds no valid files";
}

TEST(HostileFiles, DamagedSafetensorsGiveAFormatErrorAtMost) { damage("safetensors", io_test::parse_whole_safetensors, true); }
TEST(HostileFiles, DamagedCheckpointsGiveAFormatErrorAtMost) { damage("checkpoint", io_test::parse_whole_checkpoint, true); }
// The padding behind the last tensor may be missing.
TEST(HostileFiles, DamagedGgufFilesGiveAFormatErrorAtMost) { damage("gguf", io_test::parse_whole_gguf, false); }

}  // namespace
}  // namespace subbyte
