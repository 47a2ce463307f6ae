// libFuzzer target: any bytes as a safetensors file. Seeds: testdata/fuzz/safetensors.
#include "subbyte/io/parse_whole_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  subbyte::io_test::parse_whole_safetensors({data, size});
  subbyte::io_test::parse_whole_index({data, size});
  return 0;
}
