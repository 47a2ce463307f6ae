#include "subbyte/base/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "subbyte/base/error.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace subbyte {
namespace {

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "avx512_vnni"};

#if defined(__x86_64__)
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};
Leaf cpuid(unsigned leaf, unsigned sub) {
  Leaf r;
  if (!__get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d)) return Leaf{};
  return r;
}
uint64_t xcr0() {
  unsigned lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}
#endif

struct Detected {
  CpuInfo info{};
  Isa isa = Isa::kScalar;
};

Detected detect() {
  Detected out;
#if defined(__x86_64__)
  const Leaf l1 = cpuid(1, 0), l7 = cpuid(7, 0), l71 = cpuid(7, 1);
  auto bit = [](unsigned r, int i) { return ((r >> i) & 1u) != 0; };
  const bool osxsave = bit(l1.c, 27);
  const uint64_t x = osxsave ? xcr0() : 0;
  const bool ymm = (x & 0x6) == 0x6, zmm = ymm && (x & 0xe0) == 0xe0;  // the OS saves these registers
  CpuInfo& i = out.info;
  i.avx2 = ymm && bit(l7.b, 5);
  i.fma = ymm && bit(l1.c, 12);
  i.f16c = ymm && bit(l1.c, 29);
  i.avx512f = zmm && bit(l7.b, 16);
  i.avx512bw = zmm && bit(l7.b, 30);
  i.avx512vbmi = zmm && bit(l7.c, 1);
  i.avx512vnni = zmm && bit(l7.c, 11);
  i.avx512bf16 = zmm && bit(l71.a, 5);
  i.avxvnni = ymm && bit(l71.a, 4);
  i.amx_int8 = (x & 0x60000) == 0x60000 && bit(l7.d, 25);
  const bool dq_vl = bit(l7.b, 17) && bit(l7.b, 31);
  const bool vbmi2 = bit(l7.c, 6), bitalg = bit(l7.c, 12), vpopcnt = bit(l7.c, 14), bmi2 = bit(l7.b, 8);
  if (i.avx2 && i.fma && i.f16c && bmi2) {
    out.isa = Isa::kAvx2;
    if (i.avx512f && i.avx512bw && i.avx512vbmi && dq_vl) {
      out.isa = Isa::kAvx512;
      if (i.avx512vnni && vbmi2 && bitalg && vpopcnt) out.isa = Isa::kAvx512Vnni;
    }
  }
  unsigned brand[12] = {};
  unsigned a, b, c, d;
  if (__get_cpuid(0x80000000u, &a, &b, &c, &d) && a >= 0x80000004u) {
    for (unsigned k = 0; k < 3; ++k)
      __get_cpuid(0x80000002u + k, &brand[4 * k], &brand[4 * k + 1], &brand[4 * k + 2], &brand[4 * k + 3]);
    char text[49] = {};
    std::memcpy(text, brand, 48);
    i.brand = text;
  }
#endif
  return out;
}

const Detected& detected() {
  static const Detected d = detect();
  return d;
}

Isa checked(Isa isa, const char* who) {
  check_arg(isa <= detected_isa(), who, "=", isa_name(isa), " is not available on this machine, which has ",
            isa_name(detected_isa()));
  return isa;
}

Isa from_environment() {
  const char* name = std::getenv("SUBBYTE_FORCE_ISA");
  if (name == nullptr || *name == '\0') return detected_isa();
  return checked(isa_from_name(name), "SUBBYTE_FORCE_ISA");
}

std::atomic<int> forced{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

Isa isa_from_name(std::string_view name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (name == kNames[i]) return Isa(i);
  throw std::invalid_argument(
      detail::concat("unknown instruction set '", name, "', expected scalar, avx2, avx512 or avx512_vnni"));
}

Isa detected_isa() { return detected().isa; }

Isa active_isa() {
  const int f = forced.load(std::memory_order_relaxed);
  if (f >= 0) return Isa(f);
  static const Isa isa = from_environment();
  return isa;
}

ScopedIsa::ScopedIsa(Isa isa) : previous_(forced.load()) { forced.store(int(checked(isa, "ScopedIsa"))); }
ScopedIsa::~ScopedIsa() { forced.store(previous_); }

CpuInfo cpu_info() { return detected().info; }

}  // namespace subbyte
