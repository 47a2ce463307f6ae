// Little-endian reader over bytes in memory. Every read is checked against the end; a read past it is a FormatError that names
// the part being read and the byte offset, and moves nothing.
#pragma once
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include "subbyte/base/error.h"

namespace subbyte {

class ByteReader {
 public:
  // Offsets in errors count from the first byte of `bytes`.
  explicit ByteReader(std::span<const uint8_t> bytes, uint64_t offset_bytes = 0) : bytes_(bytes), offset_(offset_bytes) {}

  uint64_t offset() const { return offset_; }
  uint64_t remaining() const { return bytes_.size() - offset_; }

  // `where` names the tensor or key, `what` the field.
  template <class T>
  T read(std::string_view where, const char* what) {
    static_assert(std::is_arithmetic_v<T>);
    const uint8_t* p = take(sizeof(T), where, what);
    std::remove_cv_t<T> v;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    std::memcpy(&v, p, sizeof(T));
#else
    uint8_t swapped[sizeof(T)];
    for (size_t i = 0; i < sizeof(T); ++i) swapped[i] = p[sizeof(T) - 1 - i];
    std::memcpy(&v, swapped, sizeof(T));
#endif
    return v;
  }

  // The next `count` bytes, viewed in place.
  const uint8_t* take(uint64_t count, std::string_view where, const char* what) {
    if (count > remaining())
      throw FormatError(std::string(where), offset_,
                        detail::concat(what, " needs ", count, " bytes, the file has ", remaining(), " left"));
    const uint8_t* p = bytes_.data() + offset_;
    offset_ += count;
    return p;
  }

 private:
  std::span<const uint8_t> bytes_;
  uint64_t offset_;
};

}  // namespace subbyte
