// The subcommands of the program. Each adds itself to the parser and runs when its name was given; failures leave as
// exceptions: UsageError ends the program with 2, any other with 1.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace CLI {
class App;
}

namespace subbyte::cli {

class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void add_inspect(CLI::App& app);
void add_quantize(CLI::App& app);  // and convert
void add_bench(CLI::App& app);
void add_doctor(CLI::App& app);

// "12.3 MB", decimal.
std::string bytes_text(int64_t bytes);
// `text` with control characters (a file's names may hold any) and bytes that are no UTF-8 as \xNN, so that they cannot steer a
// terminal and every reader of the output can decode it.
std::string printable(const std::string& text);
// Peak resident memory of this process; 0 where the system does not tell.
int64_t peak_memory_bytes();

}  // namespace subbyte::cli
