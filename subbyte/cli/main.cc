#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>

#include "subbyte/cli/commands.h"
#include "subbyte/io/utf8.h"

namespace subbyte::cli {

std::string bytes_text(int64_t bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB"};
  auto v = double(bytes);
  int u = 0;
  while (v >= 1000 && u < 4) {
    v /= 1000;
    ++u;
  }
  return u == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", v, units[u]);
}

std::string printable(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const int bytes = utf8_character_bytes(std::string_view(text).substr(i));
    const auto u = uint8_t(text[i]);
    const bool control = u < 0x20 || u == 0x7f || (bytes == 2 && u == 0xc2 && uint8_t(text[i + 1]) < 0xa0);
    if (bytes > 0 && !control) {
      out += text.substr(i, size_t(bytes));
      i += size_t(bytes);
    } else {
      out += fmt::format("\\x{:02x}", u);
      ++i;
    }
  }
  return out;
}

int64_t peak_memory_bytes() {
  // VmHWM, since ru_maxrss starts from the size of the process that started this one.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::atoll(line.c_str() + 6) * 1024;
  return 0;
}

namespace {

// One line, whatever the message holds.
int fail(int code, const char* message) {
  fmt::print(stderr, "subbyte: {}\n", printable(message));
  return code;
}

int run(int argc, char** argv) {
  CLI::App app{"Networks with 1- to 8-bit packed weights: look into model files, pack them, measure this machine.", "subbyte"};
  app.set_version_flag("--version", "subbyte " SB_VERSION);
  app.require_subcommand(1);
  app.footer("Exit codes: 0 done, 1 a file or the machine refused, 2 wrong usage.");
  add_inspect(app);
  add_quantize(app);
  add_bench(app);
  add_doctor(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;  // --help and --version come this way too
  } catch (const UsageError& e) {
    return fail(2, e.what());
  } catch (const std::bad_alloc&) {
    return fail(1, "out of memory");
  } catch (const std::exception& e) {
    return fail(1, e.what());
  }
  return std::fflush(stdout) == 0 ? 0 : fail(1, "cannot write to standard output");
}

}  // namespace
}  // namespace subbyte::cli

int main(int argc, char** argv) { return subbyte::cli::run(argc, argv); }
