// Errors of the core. Three kinds, one for each party that can be at fault:
//   std::invalid_argument  the caller passed something the op cannot mean      -> Python ValueError
//   FormatError            a file does not say what its format demands         -> Python subbyte.FormatError
//   DeviceError            the GPU runtime refused, text of the runtime inside -> Python RuntimeError
// Checks stand at the entry of an op, before anything is written; kernels are noexcept and check nothing.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace subbyte {

// A file that contradicts its own format. `what()` names the file part (tensor or key), the byte offset and the expectation.
class FormatError : public std::runtime_error {
 public:
  FormatError(std::string where, uint64_t offset_bytes, const std::string& expectation)
      : std::runtime_error(where + " at byte " + std::to_string(offset_bytes) + ": " + expectation),
        where_(std::move(where)),
        offset_bytes_(offset_bytes) {}
  const std::string& where() const noexcept { return where_; }
  uint64_t offset_bytes() const noexcept { return offset_bytes_; }

 private:
  std::string where_;
  uint64_t offset_bytes_;
};

class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The file system refused (missing file, full disk). Kept apart from FormatError: the bytes were never judged.
class IoError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}
}  // namespace detail

// check_arg(ok, "linear: x has ", 3, " columns, expected K = ", 4): throws std::invalid_argument when !ok.
// The message parts are only formatted on failure.
template <class... Parts>
inline void check_arg(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    throw std::invalid_argument(detail::concat(parts...));
}

}  // namespace subbyte
