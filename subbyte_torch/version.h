// What this library was built as. Plain C, so that a loader can ask before it touches any op.
#pragma once

#if defined(__GNUC__)
#define SB_TORCH_EXPORT __attribute__((visibility("default")))
#else
#define SB_TORCH_EXPORT
#endif

extern "C" {
// PyTorch version of the headers, "2.11.0". The library works with that minor version alone.
SB_TORCH_EXPORT const char* subbyte_torch_built_with();
// "0.1.0".
SB_TORCH_EXPORT const char* subbyte_version();
// 1 when CUDA kernels are inside.
SB_TORCH_EXPORT int subbyte_torch_has_cuda();
}
