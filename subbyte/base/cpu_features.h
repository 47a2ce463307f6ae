// Which instruction sets this processor has, and which one subbyte uses.
// One binary holds kernels for all of them; selection happens at run time. Order means "includes the ones before".
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace subbyte {

enum class Isa : uint8_t {
  kScalar,      // baseline x86-64 (or any other machine)
  kAvx2,        // AVX2, FMA, F16C, BMI2
  kAvx512,      // + AVX-512 F, BW, DQ, VL, VBMI
  kAvx512Vnni,  // + AVX512_VNNI, AVX512_VBMI2, AVX512_BITALG, AVX512_VPOPCNTDQ
};
inline constexpr int kIsaCount = 4;

// "scalar", "avx2", "avx512", "avx512_vnni".
const char* isa_name(Isa isa);
// Throws std::invalid_argument for a name that is not one of isa_name's.
Isa isa_from_name(std::string_view name);

// What CPUID and the operating system offer. Constant for the life of the process.
Isa detected_isa();

// What kernels may use: detected_isa(), or SUBBYTE_FORCE_ISA when that is set (read once), or the value of a ScopedIsa.
// A forced set the machine lacks throws std::invalid_argument: running on would be a silent change of what was asked.
Isa active_isa();

// Forces a set for the life of the object, for tests and benchmarks. Not for concurrent use with itself.
class ScopedIsa {
 public:
  explicit ScopedIsa(Isa isa);  // throws std::invalid_argument when the machine lacks it
  ~ScopedIsa();
  ScopedIsa(const ScopedIsa&) = delete;
  ScopedIsa& operator=(const ScopedIsa&) = delete;

 private:
  int previous_;
};

struct CpuInfo {
  std::string brand;  // CPUID brand string, "" when unknown
  bool avx2, fma, f16c, avx512f, avx512bw, avx512vbmi, avx512vnni, avx512bf16, avxvnni, amx_int8;
};
CpuInfo cpu_info();

}  // namespace subbyte
