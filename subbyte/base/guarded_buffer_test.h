// For tests: an array with canaries on both sides, so that a kernel that writes just before or after it is caught, and that
// starts full of a pattern (NaN for float types), so that a kernel that writes nothing is caught too.
#pragma once
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace subbyte::testing {

template <class T>
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t count) : count_(count), storage_(size_t(count) * sizeof(T) + 2 * kGuardBytes, 0xff) {
    for (size_t i = 0; i < kGuardBytes; ++i) storage_[i] = storage_[storage_.size() - 1 - i] = kCanary;
  }
  T* data() { return reinterpret_cast<T*>(storage_.data() + kGuardBytes); }
  const T* data() const { return reinterpret_cast<const T*>(storage_.data() + kGuardBytes); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }
  // True when nothing outside the array was written.
  bool intact() const {
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (storage_[i] != kCanary || storage_[storage_.size() - 1 - i] != kCanary) return false;
    return true;
  }
  std::vector<T> copy() const { return std::vector<T>(data(), data() + count_); }

 private:
  static constexpr size_t kGuardBytes = 128;
  static constexpr uint8_t kCanary = 0xa5;
  int64_t count_;
  std::vector<uint8_t> storage_;
};

}  // namespace subbyte::testing
