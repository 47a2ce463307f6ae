#include "subbyte/base/parallel_for.h"

#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace subbyte {
namespace {

// The number of threads is a setting of the process: every test puts it back.
class ParallelFor : public ::testing::Test {
 protected:
  void TearDown() override {
    set_parallel_backend(nullptr);
    set_num_threads(threads_before_);
  }
  int threads_before_ = num_threads();
};

TEST_F(ParallelFor, CoversEveryIndexOnceForAnySizeGrainAndNumberOfThreads) {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    EXPECT_EQ(num_threads(), threads);
    for (int64_t size : {0, 1, 2, 7, 64, 1000, 4097})
      for (int64_t grain : {0, 1, 3, 64, 5000}) {
        std::vector<std::atomic<int>> seen(static_cast<size_t>(size));
        parallel_for(size, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) seen[size_t(i)].fetch_add(1);
        });
        for (int64_t i = 0; i < size; ++i) ASSERT_EQ(seen[size_t(i)].load(), 1) << threads << " threads, size " << size;
      }
  }
}

TEST_F(ParallelFor, RangesHaveAtLeastTheGrainButTheLast) {
  set_num_threads(4);
  for (int64_t grain : {1, 7, 100}) {
    std::mutex mutex;
    std::vector<std::pair<int64_t, int64_t>> ranges;
    parallel_for(1003, grain, [&](int64_t begin, int64_t end) {
      std::lock_guard lock(mutex);
      ranges.emplace_back(begin, end);
    });
    for (const auto& [begin, end] : ranges) EXPECT_TRUE(end - begin >= grain || end == 1003) << begin << " to " << end;
  }
}

TEST_F(ParallelFor, WorkBelowTheGrainStaysOnTheCallingThread) {
  set_num_threads(4);
  const auto caller = std::this_thread::get_id();
  int calls = 0;
  parallel_for(100, 100, [&](int64_t begin, int64_t end) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    EXPECT_EQ(begin, 0);
    EXPECT_EQ(end, 100);
    ++calls;
  });
  EXPECT_EQ(calls, 1);
}

TEST_F(ParallelFor, ANestedCallRunsOnItsOwnThreadAndCoversItsRange) {
  set_num_threads(4);
  std::vector<std::atomic<int>> seen(64 * 32);
  parallel_for(64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto outer = std::this_thread::get_id();
      parallel_for(32, 1, [&](int64_t b, int64_t e) {
        EXPECT_EQ(std::this_thread::get_id(), outer);
        for (int64_t j = b; j < e; ++j) seen[size_t(i * 32 + j)].fetch_add(1);
      });
    }
  });
  for (auto& s : seen) ASSERT_EQ(s.load(), 1);
}

TEST_F(ParallelFor, CallsFromSeveralThreadsOfTheProgramAllFinish) {
  set_num_threads(3);
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 50; ++repeat)
        parallel_for(1000, 10, [&](int64_t begin, int64_t end) { total.fetch_add(end - begin); });
    });
  for (auto& c : callers) c.join();
  EXPECT_EQ(total.load(), 4 * 50 * 1000);
}

std::atomic<int> backend_calls{0};
int64_t backend_grain = 0;
void two_halves(int64_t size, int64_t grain, ParallelBody body, void* context) {
  backend_calls.fetch_add(1);
  backend_grain = grain;
  body(context, size / 2, size);
  body(context, 0, size / 2);
}

TEST_F(ParallelFor, AReplacedBackendGetsTheWorkUntilItIsTakenBack) {
  set_parallel_backend(two_halves);
  backend_calls = 0;
  std::vector<int> seen(101, 0);
  auto mark = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++seen[size_t(i)];
  };
  parallel_for(101, 5, mark);
  EXPECT_EQ(backend_calls.load(), 1);
  EXPECT_EQ(backend_grain, 5);
  parallel_for(0, 5, mark);
  EXPECT_EQ(backend_calls.load(), 1) << "no call for no work";
  set_parallel_backend(nullptr);
  parallel_for(101, 5, mark);
  EXPECT_EQ(backend_calls.load(), 1);
  for (int s : seen) EXPECT_EQ(s, 2);
}

TEST_F(ParallelFor, RefusesAThreadCountBelowOne) {
  EXPECT_THROW(set_num_threads(0), std::invalid_argument);
  EXPECT_THROW(set_num_threads(-3), std::invalid_argument);
  EXPECT_EQ(num_threads(), threads_before_);
}

}  // namespace
}  // namespace subbyte
