#include "subbyte/base/dtype.h"

namespace subbyte {

const char* dtype_name(DType t) {
  switch (t) {
    case DType::kF32: return "float32";
    case DType::kF16: return "float16";
    case DType::kBF16: return "bfloat16";
    case DType::kF64: return "float64";
  }
  return "unknown";
}

}  // namespace subbyte
