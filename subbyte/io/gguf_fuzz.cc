// libFuzzer target: any bytes as a gguf file. Seeds: testdata/fuzz/gguf.
#include "subbyte/io/parse_whole_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  subbyte::io_test::parse_whole_gguf({data, size});
  return 0;
}
