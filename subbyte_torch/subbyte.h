// Everything a C++ program needs of the LibTorch layer.
#pragma once
#include "subbyte_torch/device_checks.h"        // IWYU pragma: export
#include "subbyte_torch/nn/binary.h"            // IWYU pragma: export
#include "subbyte_torch/nn/binary_embedding.h"  // IWYU pragma: export
#include "subbyte_torch/nn/embedding.h"         // IWYU pragma: export
#include "subbyte_torch/nn/linear.h"            // IWYU pragma: export
#include "subbyte_torch/nn/mpq_linear.h"        // IWYU pragma: export
#include "subbyte_torch/nn/quantize.h"          // IWYU pragma: export
#include "subbyte_torch/nn/quantized.h"         // IWYU pragma: export
#include "subbyte_torch/nn/ternary.h"           // IWYU pragma: export
#include "subbyte_torch/ops.h"                  // IWYU pragma: export
#include "subbyte_torch/optim/diode_mix.h"      // IWYU pragma: export
#include "subbyte_torch/optim/galore.h"         // IWYU pragma: export
#include "subbyte_torch/optim/mpq_update.h"     // IWYU pragma: export
#include "subbyte_torch/optim/packed_adamw.h"   // IWYU pragma: export
#include "subbyte_torch/optim/packed_lion.h"    // IWYU pragma: export
#include "subbyte_torch/optim/packed_sgd.h"     // IWYU pragma: export
#include "subbyte_torch/packed_weight.h"        // IWYU pragma: export
#include "subbyte_torch/version.h"              // IWYU pragma: export
