// A file as read-only memory. Empty files are allowed (data() is then null).
// Limit: a file that another process shortens while it is mapped ends this process with SIGBUS, as for every user of mmap;
// writers that replace files by rename, as those of this library do, never cause it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace subbyte {

class MappedFile {
 public:
  // Throws IoError, naming the path and the system's reason, when the file cannot be opened, is not a regular file or cannot
  // be mapped.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const uint8_t> bytes() const { return {data_, size_}; }
  const std::string& path() const { return path_; }
  // Says that [begin, begin + count) will not be read again soon: its pages leave this process's resident memory. Content and
  // validity do not change; a later read fetches the pages again.
  void release(uint64_t begin, uint64_t count) const;

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace subbyte
