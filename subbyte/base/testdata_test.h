// Where the tests find their files.
#pragma once
#include <cstdlib>
#include <string>

namespace subbyte::testing {

// The environment variable SB_TESTDATA_DIR wins over the folder compiled in: test programs also run away from their sources.
inline std::string testdata_dir() {
  const char* dir = std::getenv("SB_TESTDATA_DIR");
  return dir != nullptr && *dir != '\0' ? dir : SB_TESTDATA_DIR;
}

}  // namespace subbyte::testing
