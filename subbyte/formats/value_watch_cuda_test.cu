#include "subbyte/base/value_watch.h"

#include <limits>

#include "subbyte/formats/cuda_testing.h"

namespace subbyte {
namespace {

using testing::DeviceBuffer;

TEST(ValueWatchCuda, GoodValuesReportNothing) {
  testing::TestStream stream;
  const std::vector<int64_t> wide = {0, 9, 4};
  const std::vector<int32_t> narrow = {9, 0};
  const std::vector<float> numbers = {1.0f, 1e-30f, std::numeric_limits<float>::max()};
  const std::vector<uint8_t> codes = {0, 7, 99, 7, 0, 99};  // the third column lies between the rows
  DeviceBuffer d_wide(wide), d_narrow(narrow), d_numbers(numbers), d_codes(codes);
  const auto at = [&](int i) {
    return cuda::WatchedScale{reinterpret_cast<const float*>(d_numbers.data()) + i, DType::kF32, "s"};
  };
  cuda::watch_indices(d_wide.data(), true, 3, 10, "op", "index", stream.stream());
  cuda::watch_indices(d_narrow.data(), false, 2, 10, "op", "index", stream.stream());
  cuda::watch_indices(nullptr, true, 0, 0, "op", "index", stream.stream());
  cuda::watch_scales(at(0), at(1), cuda::ScaleRange::kPositive, "op", stream.stream());
  cuda::watch_finite(d_numbers.data(), DType::kF32, 1, 3, 3, "op", "w", stream.stream());
  cuda::watch_codes(d_codes.data(), 2, 2, 3, 8, "op", "code", stream.stream());
  EXPECT_EQ(stream.reported(), "");
}

TEST(ValueWatchCuda, EveryKindOfBadValueIsNamedAndForgottenOnceThrown) {
  testing::TestStream stream;
  const std::vector<int64_t> wide = {0, 10, 4};
  const std::vector<int32_t> narrow = {9, -1};
  const std::vector<float> numbers = {1.0f, 0.0f, NAN, INFINITY};
  const std::vector<uint8_t> codes = {0, 7, 99, 7, 8, 99};
  DeviceBuffer d_wide(wide), d_narrow(narrow), d_numbers(numbers), d_codes(codes);
  const auto at = [&](int i, const char* name) {
    return cuda::WatchedScale{reinterpret_cast<const float*>(d_numbers.data()) + i, DType::kF32, name};
  };
  cuda::watch_indices(d_wide.data(), true, 3, 10, "op", "index", stream.stream());
  stream.wait();
  EXPECT_THROW(cuda::throw_watched(), std::out_of_range);
  EXPECT_NO_THROW(cuda::throw_watched());
  cuda::watch_indices(d_narrow.data(), false, 2, 10, "op", "index", stream.stream());
  stream.expect_report("op: index -1 at position 1 is outside the table, expected 0 <= index < 10");
  cuda::watch_scales(at(0, "a"), at(1, "b"), cuda::ScaleRange::kPositive, "op", stream.stream());
  stream.expect_report("op: b is 0, expected a finite number above 0");
  cuda::watch_scales(at(1, "a"), at(2, "b"), cuda::ScaleRange::kFinite, "op", stream.stream());
  stream.expect_report("op: b is nan, expected a finite number");
  cuda::watch_scales(at(3, "a"), {}, cuda::ScaleRange::kFinite, "op", stream.stream());
  stream.wait();
  EXPECT_THROW(cuda::throw_watched(), std::invalid_argument);
  cuda::watch_finite(d_numbers.data(), DType::kF32, 2, 1, 3, "op", "w", stream.stream());
  stream.expect_report("op: w[1, 0] is inf, expected finite values");
  cuda::watch_codes(d_codes.data(), 2, 2, 3, 8, "op", "code", stream.stream());
  stream.expect_report("op: code 8 at [1, 1] is outside the format, expected below 8");
}

TEST(ValueWatchCuda, WhenToldToWaitTheWatchThrowsItself) {
  testing::TestStream stream;
  const std::vector<int64_t> indices = {3};
  DeviceBuffer d(indices);
  cuda::set_watch_waits(true);
  EXPECT_THROW(cuda::watch_indices(d.data(), true, 1, 3, "op", "index", stream.stream()), std::out_of_range);
  EXPECT_NO_THROW(cuda::watch_indices(d.data(), true, 1, 4, "op", "index", stream.stream()));
  cuda::set_watch_waits(false);
  EXPECT_EQ(stream.reported(), "");
}

TEST(ValueWatchCuda, ACapturedWatchReportsWhenTheGraphRuns) {
  testing::TestStream stream;
  const std::vector<int64_t> indices = {3};
  DeviceBuffer d(indices);
  cuda::set_watch_waits(true);  // a capture is not waited for
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t run = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(stream.raw(), cudaStreamCaptureModeGlobal), cudaSuccess);
  EXPECT_NO_THROW(cuda::watch_indices(d.data(), true, 1, 3, "op", "index", stream.stream()));
  ASSERT_EQ(cudaStreamEndCapture(stream.raw(), &graph), cudaSuccess);
  cuda::set_watch_waits(false);
  EXPECT_EQ(stream.reported(), "");
  ASSERT_EQ(cudaGraphInstantiate(&run, graph, 0), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(run, stream.raw()), cudaSuccess);
  stream.expect_report("op: index 3 at position 0");
  cudaGraphExecDestroy(run);
  cudaGraphDestroy(graph);
}

}  // namespace
}  // namespace subbyte
