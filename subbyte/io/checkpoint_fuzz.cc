// libFuzzer target: any bytes as a checkpoint file. Seeds: testdata/fuzz/checkpoint.
#include "subbyte/io/parse_whole_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  subbyte::io_test::parse_whole_checkpoint({data, size});
  return 0;
}
