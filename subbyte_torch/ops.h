// The dispatcher's operations as C++ functions: torch.ops.subbyte.* without Python. For callers; an operation's own file
// includes the headers it needs, so that a new operation does not compile all others again.
#pragma once
#include "subbyte_torch/ops/affine_update.h"  // IWYU pragma: export
#include "subbyte_torch/ops/binary.h"         // IWYU pragma: export
#include "subbyte_torch/ops/embedding.h"      // IWYU pragma: export
#include "subbyte_torch/ops/fine_grid.h"      // IWYU pragma: export
#include "subbyte_torch/ops/mpq.h"            // IWYU pragma: export
#include "subbyte_torch/ops/packed.h"         // IWYU pragma: export
#include "subbyte_torch/ops/packed_update.h"  // IWYU pragma: export
#include "subbyte_torch/ops/quantized.h"      // IWYU pragma: export
#include "subbyte_torch/ops/relayout.h"       // IWYU pragma: export
#include "subbyte_torch/ops/ternary.h"        // IWYU pragma: export
