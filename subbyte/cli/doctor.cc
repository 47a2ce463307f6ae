// subbyte doctor: what this machine has, and which kernels would run on it.
#include <dlfcn.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>

#include "subbyte/base/cpu_features.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/cli/commands.h"
#include "subbyte/formats/format.h"
#include "subbyte/ops/linear/kernels.h"
#include "subbyte/ops/linear_a8/kernels.h"

namespace subbyte::cli {
namespace {

using Json = nlohmann::ordered_json;

// The driver is asked through its C interface, so that the program needs no CUDA to build or start.
Json cuda_json() {
  Json out = {{"built_with_cuda", SB_WITH_CUDA != 0}, {"driver", nullptr}, {"devices", Json::array()}};
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    out["note"] = "no NVIDIA driver (libcuda.so.1) on this machine";
    return out;
  }
  auto init = reinterpret_cast<int (*)(unsigned)>(::dlsym(library, "cuInit"));
  auto version = reinterpret_cast<int (*)(int*)>(::dlsym(library, "cuDriverGetVersion"));
  auto count = reinterpret_cast<int (*)(int*)>(::dlsym(library, "cuDeviceGetCount"));
  auto get = reinterpret_cast<int (*)(int*, int)>(::dlsym(library, "cuDeviceGet"));
  auto name = reinterpret_cast<int (*)(char*, int, int)>(::dlsym(library, "cuDeviceGetName"));
  auto attribute = reinterpret_cast<int (*)(int*, int, int)>(::dlsym(library, "cuDeviceGetAttribute"));
  auto memory = reinterpret_cast<int (*)(size_t*, int)>(::dlsym(library, "cuDeviceTotalMem_v2"));
  if (init == nullptr || version == nullptr || count == nullptr || get == nullptr || name == nullptr || attribute == nullptr ||
      memory == nullptr) {
    out["note"] = "libcuda.so.1 lacks functions every driver has";
    return out;
  }
  if (const int error = init(0); error != 0) {
    out["note"] = fmt::format("the NVIDIA driver does not start: cuInit returned {}", error);
    return out;
  }
  int v = 0, devices = 0;
  if (version(&v) == 0) out["driver"] = fmt::format("CUDA {}.{}", v / 1000, v % 1000 / 10);
  if (count(&devices) != 0) devices = 0;
  for (int i = 0; i < devices; ++i) {
    int device = 0, major = 0, minor = 0;
    char text[256] = {};
    size_t bytes = 0;
    constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
    if (get(&device, i) != 0 || name(text, sizeof(text) - 1, device) != 0 || attribute(&major, kMajor, device) != 0 ||
        attribute(&minor, kMinor, device) != 0 || memory(&bytes, device) != 0)
      continue;
    out["devices"].push_back(
        {{"name", text}, {"compute_capability", fmt::format("{}.{}", major, minor)}, {"memory_bytes", bytes}});
  }
  return out;
}

Json kernels_json(Isa isa) {
  constexpr int64_t kColumns = 4096, kGroupSize = 128;
  Json out = Json::array();
  for (int i = 0; i < kFormatCount; ++i) {
    const auto f = Format(i);
    for (const int64_t m : {int64_t(1), int64_t(8), int64_t(64), int64_t(512)})
      out.push_back({{"format", format_name(f)},
                     {"m", m},
                     {"linear", select_linear_kernel(m, f, kGroupSize, kColumns, DType::kF32, isa).name},
                     {"linear_a8", select_linear_a8_kernel(m, row_layout(f, kColumns), kGroupSize, isa).name}});
  }
  return out;
}

void doctor(bool as_json) {
  const CpuInfo cpu = cpu_info();
  const Isa isa = active_isa();
  const std::pair<const char*, bool> features[] = {{"avx2", cpu.avx2},
                                                   {"fma", cpu.fma},
                                                   {"f16c", cpu.f16c},
                                                   {"avx512f", cpu.avx512f},
                                                   {"avx512bw", cpu.avx512bw},
                                                   {"avx512vbmi", cpu.avx512vbmi},
                                                   {"avx512vnni", cpu.avx512vnni},
                                                   {"avx512bf16", cpu.avx512bf16},
                                                   {"avxvnni", cpu.avxvnni},
                                                   {"amx_int8", cpu.amx_int8}};
  Json feature_list = Json::array();
  for (const auto& [name, present] : features)
    if (present) feature_list.push_back(name);
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  const Json out = {{"version", SB_VERSION},
                    {"compiler", compiler},
                    {"cpu", {{"brand", cpu.brand}, {"features", feature_list}}},
                    {"isa", {{"detected", isa_name(detected_isa())}, {"active", isa_name(isa)}}},
                    {"threads", {{"hardware", std::thread::hardware_concurrency()}, {"used", num_threads()}}},
                    {"cuda", cuda_json()},
                    {"kernels", kernels_json(isa)}};
  if (as_json) {
    fmt::print("{}\n", out.dump(2));
    return;
  }
  fmt::print("subbyte {} ({})\n", out["version"].get<std::string>(), compiler);
  fmt::print("CPU      {}\n", cpu.brand);
  std::string list;
  for (const auto& f : feature_list) list += (list.empty() ? "" : " ") + f.get<std::string>();
  fmt::print("         {}\n", list.empty() ? "no instruction set beyond the baseline" : list);
  fmt::print("kernels  {} (detected {}{})\n", isa_name(isa), isa_name(detected_isa()),
             isa == detected_isa() ? "" : "; SUBBYTE_FORCE_ISA is set");
  fmt::print("threads  {} of {}\n", num_threads(), std::thread::hardware_concurrency());
  const Json& cuda = out["cuda"];
  fmt::print("CUDA     {}; {}\n", SB_WITH_CUDA != 0 ? "built in" : "not built in",
             cuda["driver"].is_string() ? "driver " + cuda["driver"].get<std::string>() : cuda.value("note", "no driver"));
  for (const Json& d : cuda["devices"])
    fmt::print("         {}, compute capability {}, {}\n", d["name"].get<std::string>(),
               d["compute_capability"].get<std::string>(), bytes_text(d["memory_bytes"].get<int64_t>()));
  fmt::print("\nwhat runs for float32 x, K = 4096, groups of 128\n{:<8} {:>4}  {:<36} {}\n", "format", "M", "linear",
             "linear_a8");
  for (const Json& k : out["kernels"])
    fmt::print("{:<8} {:>4}  {:<36} {}\n", k["format"].get<std::string>(), k["m"].get<int64_t>(),
               k["linear"].get<std::string>(), k["linear_a8"].get<std::string>());
}

}  // namespace

void add_doctor(CLI::App& app) {
  auto json = std::make_shared<bool>(false);
  CLI::App* c = app.add_subcommand("doctor", "Show what this machine has and which kernels would run on it");
  c->add_flag("--json", *json, "Machine-readable output");
  c->callback([json] { doctor(*json); });
}

}  // namespace subbyte::cli
