// Conversions that run once, at load: plain kernels. Neighbouring threads take neighbouring columns of the word matrix, so that
// words are read and written whole cache lines at a time; the byte side is strided by a row, which the L2 cache joins.
// columns_to_codes: a thread makes the bytes of eight codes. codes_to_columns: a thread makes one word.
#include "subbyte/base/cuda_launch.h"
#include "subbyte/ops/column_words/column_words_cuda.h"

namespace subbyte::cuda {
namespace {

struct SegmentView {
  int64_t n, row_bytes, count, runs;
  int bits;
  const int32_t* order;
};

__global__ void __launch_bounds__(256) codes_kernel(SegmentView v, const uint32_t* words, uint8_t* codes) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= v.n) return;
  for (int64_t run = blockIdx.y; run < v.runs; run += gridDim.y) {
    const int count = int(min_i64(8, v.count - run * 8));
    uint64_t stream = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t k = v.order != nullptr ? int64_t(v.order[run * 8 + i]) : run * 8 + i;
      if (k >= 0 && k < v.count) stream |= uint64_t(column_code(words + n, v.n, k, v.bits)) << (i * v.bits);
    }
    uint8_t* to = codes + n * v.row_bytes + run * v.bits;
    for (int i = 0; i < (count * v.bits + 7) / 8; ++i) to[i] = uint8_t(stream >> (8 * i));
  }
}

__global__ void __launch_bounds__(256) words_kernel(SegmentView v, const uint8_t* codes, uint32_t* words) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= v.n) return;
  const uint8_t* row = codes + n * v.row_bytes;
  for (int64_t w = blockIdx.y; w < v.runs; w += gridDim.y) {
    uint32_t word = 0;
    for (int64_t k = w * 32 / v.bits; k < v.count && k * v.bits < (w + 1) * 32; ++k) {
      const int64_t from = v.order != nullptr ? int64_t(v.order[k]) : k;
      const uint32_t code = from >= 0 && from < v.count ? get_code(row, from, v.bits) : 0u;
      const int64_t shift = k * v.bits - w * 32;
      word |= shift >= 0 ? code << shift : code >> -shift;
    }
    words[w * v.n + n] = word;
  }
}

// launch(view, first byte of the segment, first word row of the segment, grid).
template <class Launch>
void for_each_segment(const RowLayout& layout, int64_t n, const int32_t* order, bool by_word, Launch&& launch) {
  int64_t word = 0;
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    const int bits = format_bits(s.format);
    const int64_t words = stream_words(s.k_count, bits);
    const SegmentView v{n, layout.row_bytes, s.k_count, by_word ? words : ceil_div(s.k_count, 8), bits, order};
    const dim3 grid(unsigned(ceil_div(n, 256)), unsigned(min_i64(v.runs, 65535)));
    if (s.k_count > 0) launch(v, s.byte_begin, word * n, grid);
    word += words;
  }
}

}  // namespace

void columns_to_codes(const ColumnsToCodesParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  for_each_segment(p.layout, p.n, p.order, false, [&](const SegmentView& v, int64_t byte, int64_t word, dim3 grid) {
    codes_kernel<<<grid, 256, 0, stream_of(stream)>>>(v, p.words + word, p.codes + byte);
  });
  check_launch("columns_to_codes");
}

void codes_to_columns(const CodesToColumnsParams& p, Stream stream) {
  if (!check_sizes(p)) return;
  for_each_segment(p.layout, p.n, p.order, true, [&](const SegmentView& v, int64_t byte, int64_t word, dim3 grid) {
    words_kernel<<<grid, 256, 0, stream_of(stream)>>>(v, p.codes + byte, p.words + word);
  });
  check_launch("codes_to_columns");
}

}  // namespace subbyte::cuda
