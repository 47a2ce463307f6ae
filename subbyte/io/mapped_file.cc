#include "subbyte/io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "subbyte/base/error.h"

namespace subbyte {
namespace {

[[noreturn]] void fail(const std::string& path, const char* what, int error) {
  throw IoError(path + ": " + what + ": " + std::strerror(error));
}

}  // namespace

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not make the open wait
  if (fd < 0) fail(path, "cannot open", errno);
  struct stat st;
  if (::fstat(fd, &st) != 0) {
    const int error = errno;
    ::close(fd);
    fail(path, "cannot stat", error);
  }
  if (!S_ISREG(st.st_mode)) {
    ::close(fd);
    throw IoError(path + ": is not a regular file");
  }
  size_ = size_t(st.st_size);
  if (size_ != 0) {
    void* p = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    ::close(fd);
    if (p == MAP_FAILED) fail(path, "cannot map", error);
    data_ = static_cast<const uint8_t*>(p);
  } else {
    ::close(fd);
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

void MappedFile::release(uint64_t begin, uint64_t count) const {
  const uint64_t page = uint64_t(::sysconf(_SC_PAGESIZE));
  if (begin >= size_) return;
  const uint64_t end = count < size_ - begin ? begin + count : size_;
  const uint64_t first = (begin + page - 1) / page * page, last = end == size_ ? end : end / page * page;
  if (first < last) ::madvise(const_cast<uint8_t*>(data_) + first, last - first, MADV_DONTNEED);
}

}  // namespace subbyte
