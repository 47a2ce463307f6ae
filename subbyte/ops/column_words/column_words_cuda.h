// columns_to_codes and codes_to_columns on a CUDA device: formulas and size checks of column_words.h, device pointers, work put
// on the stream. Same bits as the CPU. Nothing is waited for or allocated. An order entry outside [0, K) gives code 0.
// Errors: std::invalid_argument for sizes and missing arrays; DeviceError when the launch is refused.
#pragma once
#include "subbyte/base/stream.h"
#include "subbyte/ops/column_words/column_words.h"

namespace subbyte::cuda {

void columns_to_codes(const ColumnsToCodesParams& p, Stream stream);
void codes_to_columns(const CodesToColumnsParams& p, Stream stream);

}  // namespace subbyte::cuda
