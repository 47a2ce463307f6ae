#include "subbyte_torch/version.h"

#include <torch/version.h>

const char* subbyte_torch_built_with() { return TORCH_VERSION; }
const char* subbyte_version() { return SB_VERSION; }
int subbyte_torch_has_cuda() { return SB_CUDA; }
