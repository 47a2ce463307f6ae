// cuda_bench: linear, linear_a8 and dequantize on the device against what the memory allows and what a user would call instead
// (a bf16 weight in cuBLAS). Weights rotate over more than 200 MB, so that none is in a cache; launches are replayed as a
// graph; medians. Every case is compared with the definition on random outputs before it is timed.
//   cuda_bench [all]     all: more shapes and group sizes
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "subbyte/ops/dequantize/dequantize_cuda.h"
#include "subbyte/ops/linear/linear_cuda.h"
#include "subbyte/ops/linear/linear_cuda_plan.h"
#include "subbyte/ops/linear_a8/linear_a8_cuda.h"
#include "subbyte/ops/linear_grad_input/linear_grad_input_cuda.h"

namespace subbyte {
namespace {

void require(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(e));
  std::exit(1);
}

constexpr int64_t kPoolBytes = int64_t(300) << 20, kParamBytes = int64_t(32) << 20, kColdBytes = int64_t(210) << 20;

struct Bench {
  cudaStream_t stream;
  cublasHandle_t blas;
  std::vector<uint8_t> random;   // what the pool repeats
  uint8_t* pool = nullptr;       // codes, or bf16 weights for cuBLAS
  std::vector<uint16_t> scales;  // bf16
  uint16_t* device_scales = nullptr;
  std::vector<uint16_t> x;
  uint16_t *device_x = nullptr, *device_y = nullptr, *dense = nullptr;
  uint8_t* workspace = nullptr;
  static constexpr int64_t kWorkspaceBytes = int64_t(256) << 20;
};

// Microseconds of one call of run(set), median over replays of a graph of `sets` rotating calls.
double time_us(Bench& b, int sets, const std::function<void(int)>& run) {
  const int calls = std::max(sets, 20);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  require(cudaStreamBeginCapture(b.stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls; ++i) run(i % sets);
  require(cudaStreamEndCapture(b.stream, &graph), "capture");
  require(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin), "event");
  require(cudaEventCreate(&end), "event");
  for (int i = 0; i < 2; ++i) require(cudaGraphLaunch(exec, b.stream), "launch");
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    require(cudaEventRecord(begin, b.stream), "record");
    require(cudaGraphLaunch(exec, b.stream), "launch");
    require(cudaEventRecord(end, b.stream), "record");
    require(cudaEventSynchronize(end), "run");
    float ms = 0;
    require(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return double(times[times.size() / 2]) * 1e3 / calls;
}

__global__ void __launch_bounds__(512) read_kernel(const uint4* p, int64_t count, uint32_t* out) {
  uint32_t sum = 0;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = __ldg(p + i + j * step);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += step) sum ^= __ldg(p + i).x;
  if (sum == 0x9e3779b9u) *out = sum;
}

// The least time in which this device reads `bytes` cold in one launch, measured.
double read_limit_us(Bench& b, int64_t bytes) {
  const int64_t padded = round_up(bytes, 256);
  const int sets = int(std::min<int64_t>(kPoolBytes / padded, kColdBytes / padded + 1));
  double best = 1e30;
  for (int blocks : {132, 264, 528})
    best = std::min(best, time_us(b, std::max(1, sets), [&](int set) {
                      read_kernel<<<blocks, 512, 0, b.stream>>>(reinterpret_cast<const uint4*>(b.pool + set * padded),
                                                                bytes / 16, reinterpret_cast<uint32_t*>(b.workspace));
                    }));
  return best;
}

struct Shape {
  int64_t n, k;
};

PackedMatrix matrix(const Bench& b, Shape s, Format f, int64_t group_size, int set) {
  PackedMatrix w;
  w.layout = row_layout(f, s.k);
  w.n = s.n;
  w.k = s.k;
  w.group_size = group_size;
  w.codes = b.pool + set * round_up(w.codes_bytes(), 256);
  w.scales = b.device_scales + set * round_up(s.n * w.groups(), 128);
  w.scale_dtype = DType::kBF16;
  return w;
}
int sets_of(Shape s, Format f, int64_t group_size) {
  const int64_t codes = round_up(s.n * row_layout(f, s.k).row_bytes, 256),
                scales = round_up(s.n * ceil_div(s.k, group_size), 128) * 2;
  return int(std::max<int64_t>(1, std::min({kPoolBytes / codes, kParamBytes / scales, kColdBytes / codes + 1})));
}

// Largest error of random outputs against the definition, as a share of what 16-bit rounding of y explains.
double check(const Bench& b, const PackedMatrix& device, int set, int64_t m, bool a8) {
  PackedMatrix w = device;
  const int64_t codes_at = set * round_up(w.codes_bytes(), 256), scales_at = set * round_up(w.n * w.groups(), 128);
  std::vector<uint8_t> row(static_cast<size_t>(w.layout.row_bytes));
  std::vector<uint16_t> y(static_cast<size_t>(m * w.n));
  require(cudaMemcpy(y.data(), b.device_y, y.size() * 2, cudaMemcpyDeviceToHost), "copy");
  double worst = 0;
  uint64_t z = 12345;
  for (int i = 0; i < 200; ++i) {
    z = z * 6364136223846793005ull + 1442695040888963407ull;
    const int64_t at_m = int64_t((z >> 20) % uint64_t(m)), n = int64_t((z >> 36) % uint64_t(w.n));
    for (int64_t j = 0; j < w.layout.row_bytes; ++j)
      row[size_t(j)] = b.random[size_t((codes_at + n * w.layout.row_bytes + j) % int64_t(b.random.size()))];
    PackedMatrix one = w;
    one.n = 1;
    one.codes = row.data();
    one.scales = b.scales.data() + scales_at + n * w.groups();
    double sum = 0, square = 0;
    float a = 0;
    for (int64_t k = 0; k < w.k; ++k) a = std::fmax(a, std::fabs(bf16_to_float(b.x[size_t(at_m * w.k + k)])));
    for (int64_t k = 0; k < w.k; ++k) {
      const double value = packed_value(one, 0, k);
      double xv = bf16_to_float(b.x[size_t(at_m * w.k + k)]);
      if (a8) xv = double(std::rint(float(xv) * (127.0f / a))) * double(a / 127.0f);
      sum += xv * value;
      square += xv * xv * value * value;
    }
    const double error = std::fabs(double(bf16_to_float(y[size_t(at_m * w.n + n)])) - sum);
    const double ratio = error / (0x1p-8 * std::fabs(sum) + 1e-4 * std::sqrt(square));
    worst = ratio >= 0 ? std::fmax(worst, ratio) : 1e30;  // NaN fails
  }
  return worst;
}

double cublas_us(Bench& b, Shape s, int64_t m) {
  const int64_t bytes = s.n * s.k * 2;
  const int sets = int(std::max<int64_t>(1, std::min(kPoolBytes / bytes, kColdBytes / bytes + 1)));
  const float one = 1, zero = 0;
  const auto run = [&](int set) {
    if (cublasGemmEx(b.blas, CUBLAS_OP_T, CUBLAS_OP_N, int(s.n), int(m), int(s.k), &one, b.pool + set * bytes, CUDA_R_16BF,
                     int(s.k), b.device_x, CUDA_R_16BF, int(s.k), &zero, b.device_y, CUDA_R_16BF, int(s.n), CUBLAS_COMPUTE_32F,
                     CUBLAS_GEMM_DEFAULT) != CUBLAS_STATUS_SUCCESS) {
      std::printf("cublas failed\n");
      std::exit(1);
    }
  };
  run(0);
  require(cudaStreamSynchronize(b.stream), "cublas");
  return time_us(b, sets, run);
}

void bench_shape(Bench& b, Shape s, const std::vector<Format>& formats, const std::vector<int64_t>& group_sizes,
                 const std::vector<int64_t>& ms) {
  std::vector<double> blas;
  for (int64_t m : ms) blas.push_back(cublas_us(b, s, m));
  for (Format f : formats)
    for (int64_t group_size : group_sizes) {
      const int sets = sets_of(s, f, group_size);
      const PackedMatrix first = matrix(b, s, f, group_size, 0);
      const double limit = read_limit_us(b, first.codes_bytes() + first.n * first.groups() * 2);
      DequantizeParams d;
      d.out = b.dense;
      d.out_dtype = DType::kBF16;
      d.out_stride = s.k;
      const double dequantize_us = time_us(b, sets, [&](int set) {
        DequantizeParams p = d;
        p.w = matrix(b, s, f, group_size, set);
        cuda::dequantize(p, Stream{b.stream});
      });
      std::printf("%s [%lld, %lld] group_size %lld: cold read %.2f us, dequantize to bf16 %.1f us (%.0f GB/s)\n",
                  format_name(f), (long long)s.n, (long long)s.k, (long long)group_size, limit, dequantize_us,
                  (double(s.n * s.k * 2) + double(first.codes_bytes())) / dequantize_us * 1e-3);
      for (size_t i = 0; i < ms.size(); ++i) {
        LinearParams p;
        p.x = b.device_x;
        p.dtype = DType::kBF16;
        p.m = ms[i];
        p.x_stride = s.k;
        p.y = b.device_y;
        p.y_stride = s.n;
        p.workspace = b.workspace;
        p.workspace_bytes = Bench::kWorkspaceBytes;
        const auto run = [&](int set) {
          p.w = matrix(b, s, f, group_size, set);
          cuda::linear(p, Stream{b.stream});
        };
        require(cudaMemset(b.device_y, 0xff, size_t(p.m * s.n * 2)), "fill");
        run(sets - 1);
        require(cudaDeviceSynchronize(), "linear");
        const double error = check(b, p.w, sets - 1, p.m, false);
        LinearA8Params q;
        q.x = b.device_x;
        q.dtype = DType::kBF16;
        q.m = ms[i];
        q.x_stride = s.k;
        q.y = b.device_y;
        q.y_stride = s.n;
        q.workspace = b.workspace;
        q.workspace_bytes = Bench::kWorkspaceBytes;
        const auto run_a8 = [&](int set) {
          q.w = matrix(b, s, f, group_size, set);
          cuda::linear_a8(q, Stream{b.stream});
        };
        double us = 0, a8_us = 0;
        if (error < 1.05) us = time_us(b, sets, run);
        require(cudaMemset(b.device_y, 0xff, size_t(p.m * s.n * 2)), "fill");
        run_a8(sets - 1);
        require(cudaDeviceSynchronize(), "linear_a8");
        const double a8_error = check(b, q.w, sets - 1, q.m, true);
        if (a8_error < 1.05) a8_us = time_us(b, sets, run_a8);
        std::printf(
            "  M %4lld  linear %8.2f us  %3.0f%% of the read  cuBLAS bf16 %7.2f (%.2fx)  dequantize + cuBLAS %7.2f (%.2fx)  "
            "linear_a8 %8.2f (%.2fx)%s%s\n",
            (long long)ms[i], us, 100 * limit / us, blas[i], blas[i] / us, blas[i] + dequantize_us,
            (blas[i] + dequantize_us) / us, a8_us, blas[i] / a8_us, error < 1.05 ? "" : "  WRONG",
            a8_error < 1.05 ? "" : "  A8 WRONG");
        std::fflush(stdout);
      }
    }
}

int run(bool all) {
  Bench b;
  require(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking), "stream");
  if (cublasCreate(&b.blas) != CUBLAS_STATUS_SUCCESS) return 1;
  cublasSetStream(b.blas, b.stream);
  // Without a workspace of its own cuBLAS allocates one, which a capture refuses.
  void* blas_workspace;
  require(cudaMalloc(&blas_workspace, 64 << 20), "allocate");
  cublasSetWorkspace(b.blas, blas_workspace, 64 << 20);
  uint64_t z = 88172645463325252ull;
  const auto next = [&] {
    z ^= z << 13;
    z ^= z >> 7;
    z ^= z << 17;
    return z;
  };
  // Bytes below 0x7f at odd places keep the pool finite where it is read as bf16 weights.
  b.random.resize(size_t(16) << 20);
  for (size_t i = 0; i < b.random.size(); i += 8) {
    const uint64_t v = next() & 0xbfffbfffbfffbfffull;
    std::memcpy(&b.random[i], &v, 8);
  }
  require(cudaMalloc(&b.pool, kPoolBytes), "allocate");
  for (int64_t at = 0; at < kPoolBytes; at += int64_t(b.random.size()))
    require(cudaMemcpy(b.pool + at, b.random.data(), size_t(min_i64(int64_t(b.random.size()), kPoolBytes - at)),
                       cudaMemcpyHostToDevice),
            "copy");
  b.scales.resize(kParamBytes / 2);
  for (uint16_t& s : b.scales) s = float_to_bf16(0.01f + 0.01f * float(next() % 1000) * 1e-3f);
  require(cudaMalloc(&b.device_scales, kParamBytes), "allocate");
  require(cudaMemcpy(b.device_scales, b.scales.data(), kParamBytes, cudaMemcpyHostToDevice), "copy");
  b.x.resize(size_t(512) * 16384);
  for (uint16_t& v : b.x) v = float_to_bf16(float(int64_t(next() % 2001) - 1000) * 1e-3f);
  require(cudaMalloc(&b.device_x, b.x.size() * 2), "allocate");
  require(cudaMemcpy(b.device_x, b.x.data(), b.x.size() * 2, cudaMemcpyHostToDevice), "copy");
  require(cudaMalloc(&b.device_y, size_t(512) * 16384 * 2), "allocate");
  require(cudaMalloc(&b.dense, size_t(16384) * 8192 * 2), "allocate");
  require(cudaMalloc(&b.workspace, Bench::kWorkspaceBytes), "allocate");
  require(cudaDeviceSynchronize(), "set-up");

  cudaDeviceProp device;
  require(cudaGetDeviceProperties(&device, 0), "device");
  const double copy_us = time_us(b, 1, [&](int) {
    require(cudaMemcpyAsync(b.dense, b.pool, size_t(128) << 20, cudaMemcpyDeviceToDevice, b.stream), "copy");
  });
  std::printf("%s, %d multiprocessors; copy of 134 MB %.0f GB/s read and written; cold read of 134 MB %.0f GB/s\n", device.name,
              device.multiProcessorCount, 2.0 * (128 << 20) / copy_us * 1e-3,
              double(128 << 20) / read_limit_us(b, 128 << 20) * 1e-3);
  const std::vector<Format> four = {Format::kUint4}, others = {Format::kUint8, Format::kUint2, Format::kSign};
  for (Shape s : {Shape{4096, 4096}, Shape{8192, 8192}}) {
    bench_shape(b, s, four, {128}, {1, 2, 4, 8, 16, 32, 64, 128, 256, 512});
    bench_shape(b, s, others, {128}, {1, 8, 16});
  }
  bench_shape(b, {4096, 4096}, four, {32, 64}, {1, 16});
  bench_shape(b, {4096, 4096}, {Format::kUint3}, {128}, {1});
  if (all) {
    bench_shape(b, {14336, 4096}, four, {128}, {1, 8, 16, 64});
    bench_shape(b, {4096, 14336}, four, {128}, {1, 8, 16, 64});
    bench_shape(b, {576, 1536}, four, {32, 64}, {1, 8});
  }
  return 0;
}

}  // namespace
}  // namespace subbyte

int main(int argc, char** argv) { return subbyte::run(argc > 1 && std::strcmp(argv[1], "all") == 0); }
