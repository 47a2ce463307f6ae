#include "subbyte/base/parallel_for.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "subbyte/base/error.h"
#include "subbyte/base/int_math.h"

namespace subbyte {
namespace {

thread_local bool inside_pool = false;  // a nested parallel_for runs on the calling thread

constexpr int kMaxThreads = 4096;

int default_threads() {
  const char* s = std::getenv("SUBBYTE_NUM_THREADS");
  if (s == nullptr || *s == '\0') return std::max(1, int(std::thread::hardware_concurrency()));
  int n = 0;
  const char* end = s + std::strlen(s);
  const auto parsed = std::from_chars(s, end, n);
  check_arg(parsed.ec == std::errc() && parsed.ptr == end && n >= 1 && n <= kMaxThreads, "SUBBYTE_NUM_THREADS=", s,
            " is no number of threads, expected 1 to ", kMaxThreads);
  return n;
}

// Workers spin for some microseconds before they sleep: an op at M = 1 lasts as long as a wake-up.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& t : workers_) t.join();
  }
  int size() const { return int(workers_.size()) + 1; }

  void run(int64_t size, int64_t chunk, ParallelBody body, void* context) {
    std::lock_guard one_job(job_mutex_);
    body_ = body;
    context_ = context;
    size_ = size;
    chunk_ = chunk;
    next_.store(0);
    active_.store(int(workers_.size()));
    {
      std::lock_guard lock(mutex_);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    inside_pool = true;
    drain();
    inside_pool = false;
    while (active_.load(std::memory_order_acquire) != 0) pause();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    std::this_thread::yield();
  }
  void drain() {
    for (;;) {
      const int64_t begin = next_.fetch_add(chunk_);
      if (begin >= size_) return;
      body_(context_, begin, std::min(begin + chunk_, size_));
    }
  }
  void work() {
    inside_pool = true;
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < 2000 && generation_.load(std::memory_order_acquire) == seen; ++i) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
      }
      seen = generation_.load();
      if (stop_.load()) return;
      drain();
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  std::atomic<int> active_{0};
  ParallelBody body_ = nullptr;
  void* context_ = nullptr;
  int64_t size_ = 0, chunk_ = 1;
};

std::mutex pool_mutex;
std::shared_ptr<Pool> the_pool;
std::atomic<int> wanted_threads{0};
std::atomic<ParallelBackend> the_backend{nullptr};

std::shared_ptr<Pool> pool() {
  std::lock_guard lock(pool_mutex);
  const int n = num_threads();
  if (!the_pool || the_pool->size() != n) the_pool = std::make_shared<Pool>(n);
  return the_pool;
}

}  // namespace

void set_parallel_backend(ParallelBackend backend) { the_backend.store(backend); }

void set_num_threads(int n) {
  check_arg(n >= 1, "set_num_threads: n is ", n, ", expected at least 1");
  wanted_threads.store(n);
}

int num_threads() {
  if (const int n = wanted_threads.load(); n > 0) return n;
  static const int n = default_threads();
  return n;
}

void parallel_for(int64_t size, int64_t grain, ParallelBody body, void* context) {
  if (size <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (ParallelBackend backend = the_backend.load(); backend != nullptr) return backend(size, grain, body, context);
  const int n = num_threads();
  if (n == 1 || size <= grain || inside_pool) return body(context, 0, size);
  // Four chunks a thread even out unequal progress; never below the grain.
  const int64_t chunk = round_up(std::max(grain, ceil_div(size, int64_t(n) * 4)), grain);
  pool()->run(size, chunk, body, context);
}

}  // namespace subbyte
