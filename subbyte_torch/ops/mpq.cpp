// The conversions of ops/mpq.h, as C++ functions and as operations of Python. Composed of pack, unpack and the column ops,
// whose kernels run where the tensors are; index tensors are read on the CPU.
#include "subbyte_torch/ops/mpq.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "subbyte_torch/convert.h"
#include "subbyte_torch/ops/packed.h"

namespace subbyte {
namespace {

std::string format_of_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, op, ": bits is ", bits, ", expected 1 to 8");
  return translated([&] { return format_name(format_from_bits(int(bits))); });
}

void check_zeros_minus(const char* op, int64_t zeros_minus) {
  TORCH_CHECK_VALUE(zeros_minus == 0 || zeros_minus == 1, op, ": zeros_minus is ", zeros_minus,
                    ", expected 1 (GPTQ v1 and GBA) or 0 (GPTQ v2)");
}

void check_integers(const char* op, const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK_VALUE(at::isIntegralType(t.scalar_type(), /*includeBool=*/false) && t.dim() == dim, op, ": ", name, " is ",
                    t.scalar_type(), " ", t.sizes(), ", expected integers of ", dim, dim == 1 ? " dimension" : " dimensions");
}

void check_values(const char* op, const char* name, const at::Tensor& t, int64_t groups, int64_t n) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == groups && t.size(1) == n, op, ": ", name, " is ", t.sizes(),
                    ", expected [groups, N] = [", groups, ", ", n, "]");
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16, op, ": ",
                    name, " is ", t.scalar_type(), ", expected float32, float16 or bfloat16");
  TORCH_CHECK_VALUE(at::isfinite(t).all().item<bool>(), op, ": ", name, " has a NaN or infinite entry");
}

std::vector<int64_t> host_values(const at::Tensor& t) {
  const at::Tensor c = t.to(at::kCPU, at::kLong).contiguous();
  std::vector<int64_t> out(size_t(c.numel()));
  const auto view = c.accessor<int64_t, 1>();
  for (int64_t i = 0; i < c.numel(); ++i) out[size_t(i)] = view[i];
  return out;
}

at::Tensor tensor_of(const std::vector<int64_t>& values) { return at::tensor(at::ArrayRef<int64_t>(values), at::kLong); }

// int16 cannot count past 32767; what overflowed is read as unsigned.
std::vector<int64_t> unsigned_values(const at::Tensor& t) {
  std::vector<int64_t> out = host_values(t);
  if (t.scalar_type() == at::kShort)
    for (int64_t& v : out) v = v < 0 ? v + 65536 : v;
  return out;
}

// Empty when there is no permutation.
std::vector<int64_t> permutation_of(const char* op, const OptionalTensor& q_perm, int64_t k) {
  if (!given(q_perm)) return {};
  check_integers(op, "q_perm", *q_perm, 1);
  TORCH_CHECK_VALUE(q_perm->numel() == k, op, ": q_perm has ", q_perm->numel(), " entries, expected K = ", k);
  std::vector<int64_t> perm = unsigned_values(*q_perm);
  if (std::all_of(perm.begin(), perm.end(), [](int64_t v) { return v == 0; })) return {};
  std::vector<bool> seen(perm.size());
  for (size_t i = 0; i < perm.size(); ++i) {
    TORCH_CHECK_VALUE(perm[i] >= 0 && perm[i] < k && !seen[size_t(perm[i])], op, ": q_perm[", i, "] is ", perm[i],
                      ", expected each of 0 .. ", k - 1, " once");
    seen[size_t(perm[i])] = true;
  }
  return perm;
}

// Joins neighbours of one width: {(8, 32), (8, 32), (4, 64)} -> "uint8*64+uint4*64".
std::string format_of_segments(const char* op, const std::vector<std::pair<int64_t, int64_t>>& segments) {
  std::vector<std::pair<int64_t, int64_t>> joined;
  for (const auto& [bits, count] : segments) {
    if (count == 0) continue;
    if (!joined.empty() && joined.back().first == bits) joined.back().second += count;
    else joined.emplace_back(bits, count);
  }
  if (joined.empty()) return "uint4";
  if (joined.size() == 1) return format_of_bits(op, joined[0].first);
  std::string out;
  for (const auto& [bits, count] : joined)
    out += (out.empty() ? "" : "+") + format_of_bits(op, bits) + "*" + std::to_string(count);
  return out;
}

struct GroupPlan {
  int64_t group_size = 1;
  std::vector<int64_t> parent;  // file group of each piece; empty: the same groups
};

// Cuts the runs of equal groups into pieces of one size, the last possibly shorter.
GroupPlan plan_groups(const std::vector<int64_t>& row_groups, const RowLayout& layout, int64_t groups, int64_t preferred) {
  const int64_t k = int64_t(row_groups.size());
  int64_t size = 0;
  for (int64_t i = 1; i < k; ++i)
    if (row_groups[size_t(i)] != row_groups[size_t(i - 1)]) size = std::gcd(size, i);
  for (int i = 1; i < layout.segment_count; ++i) size = std::gcd(size, layout.segments[i].k_begin);
  GroupPlan plan;
  plan.group_size = size != 0 ? size : std::max<int64_t>(preferred >= k ? preferred : k, 1);
  for (int64_t i = 0; i < k; i += plan.group_size) plan.parent.push_back(row_groups[size_t(i)]);
  bool same = int64_t(plan.parent.size()) == groups;
  for (size_t i = 0; same && i < plan.parent.size(); ++i) same = plan.parent[i] == int64_t(i);
  if (same) plan.parent.clear();
  return plan;
}

at::Tensor words_of(const char* op, const at::Tensor& qweight) {
  TORCH_CHECK_VALUE(qweight.dim() == 2 && (qweight.scalar_type() == at::kInt || qweight.scalar_type() == at::kLong), op,
                    ": qweight is ", qweight.scalar_type(), " ", qweight.sizes(), ", expected int32 [words, N]");
  return qweight.to(at::kInt);
}

struct GroupRuns {
  std::string format;
  std::vector<int64_t> row_groups;
};

// q_groups against `word_count` rows of words. in_features < 0: as many columns as the words hold.
GroupRuns read_q_groups(const char* op, const at::Tensor& q_groups, int64_t word_count, int64_t in_features) {
  check_integers(op, "q_groups", q_groups, 1);
  TORCH_CHECK_VALUE(q_groups.numel() % 2 == 0, op, ": q_groups has ", q_groups.numel(),
                    " entries, expected pairs (bits, first row)");
  const std::vector<int64_t> pairs = unsigned_values(q_groups);
  const size_t groups = pairs.size() / 2;
  GroupRuns out;
  std::vector<std::pair<int64_t, int64_t>> segments;
  int64_t total = 0;
  for (size_t g = 0; g < groups; ++g) {
    const int64_t bits = pairs[2 * g], first = pairs[2 * g + 1];
    const bool last = g + 1 == groups;
    const int64_t end = last ? word_count : pairs[2 * g + 3];
    TORCH_CHECK_VALUE(bits >= 1 && bits <= 8, op, ": q_groups[", 2 * g, "] is ", bits, ", expected 1 to 8 bits");
    TORCH_CHECK_VALUE((g != 0 || first == 0) && end >= first && end <= word_count, op, ": q_groups[", 2 * g + 1, "] is ", first,
                      " and the group ends at row ", end, ", expected rows from 0 to ", word_count, " in ascending order");
    int64_t rows = (end - first) * 32 / bits;
    if (last && in_features >= 0) {
      TORCH_CHECK_VALUE(in_features - total >= 0 && in_features - total <= rows, op, ": in_features is ", in_features,
                        ", q_groups describes ", total + rows, " columns");
      rows = in_features - total;
    } else {
      TORCH_CHECK_VALUE((end - first) * 32 % bits == 0, op, ": group ", g, " has ", end - first, " rows of ", bits,
                        "-bit codes, expected a whole number of codes");
    }
    segments.emplace_back(bits, rows);
    out.row_groups.insert(out.row_groups.end(), size_t(rows), int64_t(g));
    total += rows;
  }
  TORCH_CHECK_VALUE(in_features < 0 || total == in_features, op, ": q_groups describes ", total,
                    " columns, expected K = ", in_features);
  out.format = format_of_segments(op, segments);
  return out;
}

constexpr int64_t kWidths[] = {8, 6, 5, 4, 3, 2};

}  // namespace

at::Tensor ops::gptq_unpack_zeros(const at::Tensor& qzeros, int64_t bits, int64_t out_features, int64_t zeros_minus) {
  const std::string format = format_of_bits("gptq_unpack_zeros", bits);
  check_zeros_minus("gptq_unpack_zeros", zeros_minus);
  TORCH_CHECK_VALUE(out_features >= 0, "gptq_unpack_zeros: out_features is ", out_features, ", expected at least 0");
  const int64_t bytes = stream_bytes(out_features, int(bits)), words = (bytes + 3) / 4;
  TORCH_CHECK_VALUE(
      (qzeros.scalar_type() == at::kInt || qzeros.scalar_type() == at::kLong) && qzeros.dim() == 2 && qzeros.size(1) == words,
      "gptq_unpack_zeros: qzeros is ", qzeros.scalar_type(), " ", qzeros.sizes(), ", expected int32 [groups, ", words,
      "] for N = ", out_features, " and ", bits, " bits");
  const at::Tensor stream = qzeros.to(at::kInt).clone(at::MemoryFormat::Contiguous).view(at::kByte).narrow(1, 0, bytes);
  return unpack(stream.contiguous(), format, out_features).to(at::kInt).add_(zeros_minus);
}

at::Tensor ops::gptq_pack_zeros(const at::Tensor& zeros, int64_t bits, int64_t zeros_minus, bool wrap) {
  const std::string format = format_of_bits("gptq_pack_zeros", bits);
  check_zeros_minus("gptq_pack_zeros", zeros_minus);
  TORCH_CHECK_VALUE(zeros.dim() == 2, "gptq_pack_zeros: zeros has ", zeros.dim(), " dimensions, expected [groups, N]");
  at::Tensor fields = zeros.detach();
  if (fields.is_floating_point()) {
    TORCH_CHECK_VALUE(at::isfinite(fields).all().item<bool>(), "gptq_pack_zeros: zeros has a NaN or infinite entry");
    fields = fields.to(at::kDouble).round();
  }
  fields = fields.to(at::kLong) - zeros_minus;
  const int64_t mask = (int64_t(1) << bits) - 1;
  if (wrap) {
    fields = fields.bitwise_and(mask);
  } else if (fields.numel() > 0) {
    const int64_t low = fields.min().item<int64_t>(), high = fields.max().item<int64_t>();
    TORCH_CHECK_VALUE(low >= 0 && high <= mask, "gptq_pack_zeros: zeros lie in [", low + zeros_minus, ", ", high + zeros_minus,
                      "], ", bits, "-bit fields that hold z - ", zeros_minus, " say [", zeros_minus, ", ", mask + zeros_minus,
                      "]");
  }
  const at::Tensor stream = pack(fields.to(at::kByte).contiguous(), format);
  const int64_t bytes = stream.size(1), words = (bytes + 3) / 4;
  at::Tensor out = at::zeros({stream.size(0), words * 4}, stream.options());
  out.narrow(1, 0, bytes).copy_(stream);
  return out.view(at::kInt);
}

ops::ImportedWeight ops::import_columns(const at::Tensor& qweight, std::string_view format, int64_t in_features,
                                        const at::Tensor& row_groups, const at::Tensor& scales, const OptionalTensor& zeros,
                                        const OptionalTensor& integer_zeros, const OptionalTensor& q_perm, bool sort,
                                        int64_t group_size) {
  constexpr const char* op = "import_columns";
  const at::Tensor words = words_of(op, qweight);
  const int64_t k = in_features, n = words.size(1);
  const RowLayout layout = layout_of(op, format, k);
  TORCH_CHECK_VALUE(scales.dim() == 2, op, ": scales is ", scales.sizes(), ", expected [groups, N]");
  const int64_t groups = scales.size(0);
  check_device(op, "scales", scales, "qweight", qweight);
  check_values(op, "scales", scales, groups, n);
  TORCH_CHECK_VALUE(!given(zeros) || !given(integer_zeros), op,
                    ": zeros and integer_zeros are both given, expected one of them");
  check_integers(op, "row_groups", row_groups, 1);
  std::vector<int64_t> member = host_values(row_groups);
  TORCH_CHECK_VALUE(int64_t(member.size()) == k, op, ": row_groups has ", member.size(), " entries, expected K = ", k);
  for (size_t i = 0; i < member.size(); ++i) {
    if (member[i] < 0) member[i] += groups;
    TORCH_CHECK_VALUE(member[i] >= 0 && member[i] < groups, op, ": row ", i, " belongs to group ", member[i],
                      ", expected below the ", groups, " groups of scales");
  }
  std::vector<int64_t> perm = permutation_of(op, q_perm, k);

  std::vector<int64_t> order;
  if (sort && !std::is_sorted(member.begin(), member.end())) {
    order.resize(member.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return member[size_t(a)] < member[size_t(b)]; });
    auto gathered = [&](const std::vector<int64_t>& from) {
      std::vector<int64_t> to(order.size());
      for (size_t i = 0; i < order.size(); ++i) to[i] = from[size_t(order[i])];
      return to;
    };
    member = gathered(member);
    perm = perm.empty() ? order : gathered(perm);
  }

  ImportedWeight out;
  const at::TensorOptions index_options = words.options().dtype(at::kInt);
  const OptionalTensor order_tensor = order.empty() ? std::nullopt : OptionalTensor(tensor_of(order).to(index_options));
  out.codes = columns_to_codes(words, format, k, order_tensor);
  out.format = std::string(format);
  const GroupPlan plan = plan_groups(member, layout, groups, group_size);
  out.group_size = plan.group_size;
  at::Tensor parent;
  if (!plan.parent.empty() || k == 0) {
    parent = tensor_of(plan.parent).to(words.device());
    out.parent = parent;
  }
  auto spread = [&](const at::Tensor& t) { return (parent.defined() ? t.index_select(0, parent) : t).t().contiguous(); };
  out.scales = spread(scales);
  if (given(zeros)) {
    check_device(op, "zeros", *zeros, "qweight", qweight);
    check_values(op, "zeros", *zeros, groups, n);
    out.offsets = spread(zeros->neg());
  } else if (given(integer_zeros)) {
    check_device(op, "integer_zeros", *integer_zeros, "qweight", qweight);
    const at::Tensor as_float = integer_zeros->to(scales.scalar_type());
    check_values(op, "integer_zeros", as_float, groups, n);
    out.zeros = spread(as_float);
  }
  if (!perm.empty()) out.perm = tensor_of(perm).to(index_options);
  return out;
}

ops::ImportedWeight ops::gptq_import(const at::Tensor& qweight, const at::Tensor& scales, const OptionalTensor& zeros,
                                     const OptionalTensor& qzeros, const OptionalTensor& g_idx, const OptionalTensor& q_perm,
                                     int64_t bits, int64_t in_features, int64_t group_size, int64_t zeros_minus) {
  constexpr const char* op = "gptq_import";
  const std::string format = format_of_bits(op, bits);
  TORCH_CHECK_VALUE(in_features >= 0, op, ": in_features is ", in_features, ", expected at least 0");
  TORCH_CHECK_VALUE(qweight.dim() == 2 && scales.dim() == 2, op, ": qweight is ", qweight.sizes(), " and scales ",
                    scales.sizes(), ", expected [words, N] and [groups, N]");
  TORCH_CHECK_VALUE(!given(zeros) || !given(qzeros), op, ": zeros and qzeros are both given, expected one of them");
  at::Tensor row_groups;
  if (given(g_idx)) {
    row_groups = *g_idx;
  } else {
    const int64_t size =
        group_size >= 1 ? group_size : std::max<int64_t>(1, ceil_div(in_features, std::max<int64_t>(1, scales.size(0))));
    row_groups = at::arange(in_features, at::kLong).floor_divide(size);
  }
  OptionalTensor integer_zeros;
  if (given(qzeros)) integer_zeros = gptq_unpack_zeros(*qzeros, bits, qweight.size(1), zeros_minus);
  return import_columns(qweight, format, in_features, row_groups, scales, zeros, integer_zeros, q_perm, /*sort=*/true,
                        group_size);
}

ops::ImportedWeight ops::exl2_import(const at::Tensor& qweight, const at::Tensor& q_groups, const at::Tensor& scales,
                                     const OptionalTensor& zeros, const OptionalTensor& q_perm, int64_t in_features) {
  const at::Tensor words = words_of("exl2_import", qweight);
  const GroupRuns runs = read_q_groups("exl2_import", q_groups, words.size(0), in_features);
  return import_columns(words, runs.format, in_features, tensor_of(runs.row_groups), scales, zeros, std::nullopt, q_perm,
                        /*sort=*/false, /*group_size=*/0);
}

ops::ImportedWeight ops::exl2_import_map(const at::Tensor& qweight, const at::Tensor& q_group_map, at::IntArrayRef rows,
                                         const at::Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& q_perm,
                                         int64_t in_features) {
  constexpr const char* op = "exl2_import_map";
  check_integers(op, "q_group_map", q_group_map, 1);
  TORCH_CHECK_VALUE(q_group_map.numel() == 2 * in_features, op, ": q_group_map has ", q_group_map.numel(),
                    " entries, expected 2 K = ", 2 * in_features);
  TORCH_CHECK_VALUE(rows.size() == 6 || rows.size() == 7, op, ": rows has ", rows.size(),
                    " entries, expected the ends of 8, 6, 5, 4, 3 and 2 bits");
  std::vector<std::pair<int64_t, int64_t>> segments;
  int64_t begin = 0;
  for (size_t i = 0; i < 6; ++i) {
    TORCH_CHECK_VALUE(rows[i] >= begin && rows[i] <= in_features, op, ": rows[", i, "] is ", rows[i], ", expected ", begin,
                      " to ", in_features);
    segments.emplace_back(kWidths[i], rows[i] - begin);
    begin = rows[i];
  }
  TORCH_CHECK_VALUE(begin == in_features, op, ": rows ends at ", begin, ", expected K = ", in_features);
  const std::vector<int64_t> map = unsigned_values(q_group_map);
  std::vector<int64_t> row_groups(static_cast<size_t>(in_features));
  for (size_t i = 0; i < row_groups.size(); ++i) row_groups[i] = map[2 * i];
  return import_columns(qweight, format_of_segments(op, segments), in_features, tensor_of(row_groups), scales, zeros,
                        std::nullopt, q_perm, /*sort=*/false, /*group_size=*/0);
}

ops::ExportedWeight ops::export_columns(SB_PACKED_PARAMS, const OptionalTensor& parent, int64_t groups, bool asym,
                                        bool input_order) {
  constexpr const char* op = "export_columns";
  check_packed(op, {SB_PACKED});
  const int64_t n = codes.size(0), k = in_features, pieces = scales.size(1);
  const RowLayout layout = layout_of(op, format, k);
  std::vector<int64_t> owner(static_cast<size_t>(pieces));
  std::iota(owner.begin(), owner.end(), 0);
  if (given(parent)) {
    check_integers(op, "parent", *parent, 1);
    TORCH_CHECK_VALUE(parent->numel() == pieces, op, ": parent has ", parent->numel(), " entries, the scales ", pieces,
                      " groups");
    owner = host_values(*parent);
  }
  for (const int64_t g : owner)
    TORCH_CHECK_VALUE(g >= 0 && g < groups, op, ": groups is ", groups, ", expected more than the group ", g, " in use");
  TORCH_CHECK_VALUE(!asym || !given(offsets), op, ": the weight has offsets, an asymmetric layout holds zeros");
  TORCH_CHECK_VALUE(!input_order || layout.uniform() || !given(perm), op, ": format is ", format,
                    ", expected one width where rows are put back into the order of input features");

  ExportedWeight out;
  std::vector<int64_t> row_groups(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) row_groups[size_t(i)] = owner[size_t(i / group_size)];
  OptionalTensor order;
  if (input_order && given(perm)) {
    const std::vector<int64_t> stored = permutation_of(op, perm, k);
    if (!stored.empty()) {
      std::vector<int64_t> inverse(stored.size()), by_input(stored.size());
      for (size_t i = 0; i < stored.size(); ++i) {
        inverse[size_t(stored[i])] = int64_t(i);
        by_input[size_t(stored[i])] = row_groups[i];
      }
      row_groups = by_input;
      order = tensor_of(inverse).to(codes.options().dtype(at::kInt));
    }
  }
  out.qweight = codes_to_columns(codes, format, k, order);
  out.row_groups = tensor_of(row_groups).to(codes.options().dtype(at::kInt));

  // A zero in the spelling of the file, [N, G'].
  at::Tensor piece_zeros;
  if (given(offsets)) {
    piece_zeros = offsets->neg();
  } else {
    if (given(zeros)) {
      piece_zeros = *zeros;
    } else {
      std::vector<float> fixed(static_cast<size_t>(pieces));
      for (int64_t g = 0; g < pieces; ++g) fixed[size_t(g)] = format_fixed_zero(segment_of(layout, g * group_size).format);
      piece_zeros = at::tensor(at::ArrayRef<float>(fixed), at::kFloat).to(scales.options()).expand({n, pieces});
    }
    if (!asym) piece_zeros = (piece_zeros.to(at::kFloat) * scales.to(at::kFloat)).to(scales.scalar_type());
  }
  const at::Tensor index = tensor_of(owner).to(codes.device());
  auto gathered = [&](const at::Tensor& t, double missing) {
    return at::full({groups, n}, missing, t.options()).index_copy_(0, index, t.t());
  };
  out.scales = gathered(scales.detach(), 1.0);
  out.zeros = gathered(piece_zeros.detach(), asym ? 1.0 : 0.0);
  return out;
}

at::Tensor ops::q_groups_of(const at::Tensor& row_groups, std::string_view format) {
  constexpr const char* op = "q_groups_of";
  check_integers(op, "row_groups", row_groups, 1);
  const std::vector<int64_t> member = host_values(row_groups);
  const int64_t k = int64_t(member.size());
  const RowLayout layout = layout_of(op, format, k);
  std::vector<int16_t> pairs;
  int64_t word = 0;
  for (int i = 0; i < layout.segment_count; ++i) {
    const Segment& s = layout.segments[i];
    const int bits = format_bits(s.format);
    for (int64_t j = 0; j < s.k_count; ++j) {
      const int64_t at = s.k_begin + j;
      if (at != 0 && member[size_t(at)] == member[size_t(at - 1)]) {
        TORCH_CHECK_VALUE(j != 0, op, ": group ", member[size_t(at)], " has codes of two widths");
        continue;
      }
      TORCH_CHECK_VALUE(member[size_t(at)] == int64_t(pairs.size() / 2), op, ": group ", member[size_t(at)], " begins at row ",
                        at, ", expected group ", pairs.size() / 2, ": each group in one run, in order");
      TORCH_CHECK_VALUE(j * bits % 32 == 0, op, ": group ", member[size_t(at)], " begins inside a word, at row ", at, " of ",
                        bits, "-bit codes");
      const int64_t first = word + j * bits / 32;
      TORCH_CHECK_VALUE(first <= 65535, op, ": group ", member[size_t(at)], " begins at word row ", first,
                        ", which 16 bits cannot say");
      pairs.push_back(int16_t(bits));
      pairs.push_back(int16_t(uint16_t(first)));
    }
    word += (stream_bytes(s.k_count, bits) + 3) / 4;
  }
  return at::tensor(at::ArrayRef<int16_t>(pairs), at::kShort).to(row_groups.device());
}

at::Tensor ops::make_group_map(const at::Tensor& q_groups, int64_t num_qrows) {
  const std::vector<int64_t> member = read_q_groups("make_group_map", q_groups, num_qrows, -1).row_groups;
  std::vector<int16_t> map(2 * member.size());
  int64_t left = 0;
  for (size_t i = member.size(); i-- > 0;) {
    left = i + 1 < member.size() && member[i] == member[i + 1] ? left + 1 : 1;
    TORCH_CHECK_VALUE(left <= std::numeric_limits<int16_t>::max() && member[i] <= std::numeric_limits<int16_t>::max(),
                      "make_group_map: group ", member[i], " has more than 32767 rows, or there are more groups than that");
    map[2 * i] = int16_t(member[i]);
    map[2 * i + 1] = int16_t(left);
  }
  return at::tensor(at::ArrayRef<int16_t>(map), at::kShort).to(q_groups.device());
}

std::vector<int64_t> ops::rows_of_format(std::string_view format, int64_t in_features) {
  const RowLayout layout = layout_of("rows_of_format", format, in_features);
  std::vector<int64_t> rows;
  int segment = 0;
  int64_t end = 0, mask = 0;
  for (const int64_t width : kWidths) {
    if (segment < layout.segment_count && format_bits(layout.segments[segment].format) == width) {
      end += layout.segments[segment++].k_count;
      mask |= int64_t(1) << (width - 1);
    }
    rows.push_back(end);
  }
  TORCH_CHECK_VALUE(segment == layout.segment_count, "rows_of_format: format is ", format,
                    ", expected widths of 8, 6, 5, 4, 3 and 2 bits in this order, each once");
  rows.push_back(mask);
  return rows;
}

at::Tensor ops::expand_second_level(const at::Tensor& codes, const at::Tensor& zeros, const at::Tensor& scales,
                                    int64_t out_features, int64_t dq_group_size) {
  constexpr const char* op = "expand_second_level";
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() >= 2, op, ": codes is ", codes.scalar_type(), " ",
                    codes.sizes(), ", expected uint8 [groups, ...]");
  TORCH_CHECK_VALUE(out_features >= 0, op, ": out_features is ", out_features, ", expected at least 0");
  TORCH_CHECK_VALUE(dq_group_size >= 1, op, ": dq_group_size is ", dq_group_size, ", expected at least 1");
  const int64_t groups = codes.size(0), n = out_features, blocks = ceil_div(n, dq_group_size);
  const at::Tensor flat = codes.flatten(1);
  TORCH_CHECK_VALUE(flat.size(1) >= n, op, ": codes is ", codes.sizes(), ", expected at least N = ", n, " codes a group");
  auto by_column = [&](const char* name, const at::Tensor& t) {
    TORCH_CHECK_VALUE(t.is_floating_point() && t.dim() == 3 && t.size(2) == 1 && (t.size(0) == groups || t.size(0) == 1) &&
                          (t.size(1) == n || t.size(1) == blocks),
                      op, ": ", name, " is ", t.scalar_type(), " ", t.sizes(), ", expected [", groups, " or 1, ", blocks,
                      " or ", n, ", 1]");
    check_device(op, name, t, "codes", codes);
    const at::Tensor flat_t = t.squeeze(2);
    return t.size(1) == n ? flat_t : flat_t.repeat_interleave(dq_group_size, 1).narrow(1, 0, n);
  };
  const at::Tensor z = by_column("zeros", zeros), s = by_column("scales", scales);
  return (flat.narrow(1, 0, n).to(s.scalar_type()) - z) * s;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ops::requantize_second_level(const at::Tensor& values, int64_t levels,
                                                                            int64_t dq_group_size, bool per_column,
                                                                            const OptionalTensor& kept_zeros,
                                                                            const OptionalTensor& kept_scales) {
  constexpr const char* op = "requantize_second_level";
  TORCH_CHECK_VALUE(values.dim() == 2 && values.is_floating_point(), op, ": values is ", values.scalar_type(), " ",
                    values.sizes(), ", expected floating point [groups, N]");
  TORCH_CHECK_VALUE(levels >= 2 && levels <= 256, op, ": levels is ", levels, ", expected 2 to 256");
  TORCH_CHECK_VALUE(dq_group_size >= 1, op, ": dq_group_size is ", dq_group_size, ", expected at least 1");
  TORCH_CHECK_VALUE(!per_column || dq_group_size == 1, op, ": dq_group_size is ", dq_group_size,
                    ", expected 1 with a value for each column");
  TORCH_CHECK_VALUE(at::isfinite(values).all().item<bool>(), op, ": values has a NaN or infinite entry");
  const int64_t groups = values.size(0), n = values.size(1), blocks = ceil_div(n, dq_group_size);
  const at::ScalarType type = values.scalar_type();
  if (values.numel() == 0)
    return {at::zeros({groups, blocks, dq_group_size}, values.options().dtype(at::kByte)),
            at::zeros({per_column ? 1 : groups, blocks, 1}, values.options()),
            at::ones({per_column ? 1 : groups, blocks, 1}, values.options())};
  const int64_t padding = blocks * dq_group_size - n;
  at::Tensor padded = values.detach();
  if (padding > 0) padded = at::cat({padded, padded.narrow(1, n - 1, 1).expand({groups, padding})}, 1);
  const at::Tensor block = padded.reshape({groups, blocks, dq_group_size});
  const at::Tensor block32 = block.to(at::kFloat);
  const int64_t along = per_column ? 0 : 2;
  const at::Tensor low = block32.amin({along}, true), high = block32.amax({along}, true);

  const at::Tensor step = ((high - low) / double(levels - 1)).to(type);
  // A block of one value is said exactly: code 1 of scale = value, or code 0 for 0.
  const at::Tensor single = step == 0;
  at::Tensor scales = at::where(single, at::where(low == 0, at::ones_like(low), low).to(type), step);
  at::Tensor zeros = at::where(single, at::zeros_like(low), -low / scales.to(at::kFloat)).to(type);
  auto coded = [&](const at::Tensor& z, const at::Tensor& s) {
    return at::nan_to_num(at::round(block32 / s.to(at::kFloat) + z.to(at::kFloat)), 0.0).clamp_(0, levels - 1);
  };
  at::Tensor codes = at::where(single, (low != 0).to(at::kFloat).expand_as(block32), coded(zeros, scales));
  if (given(kept_zeros) && given(kept_scales) && kept_zeros->sizes() == zeros.sizes() &&
      kept_scales->sizes() == scales.sizes()) {
    const at::Tensor z = kept_zeros->to(values.options()), s = kept_scales->to(values.options());
    const at::Tensor kept = coded(z, s);
    const at::Tensor exact = ((kept.to(type) - z) * s == block).all(along, true);
    codes = at::where(exact, kept, codes);
    zeros = at::where(exact, z, zeros);
    scales = at::where(exact, s, scales);
  }
  codes = codes.to(at::kByte).contiguous();
  if (padding > 0) codes.view({groups, blocks * dq_group_size}).narrow(1, n, padding).zero_();
  return {codes, zeros.contiguous(), scales.contiguous()};
}

std::tuple<at::Tensor, at::Tensor> ops::unpack_statistic(const at::Tensor& qstatistic) {
  TORCH_CHECK_VALUE(qstatistic.scalar_type() == at::kByte, "unpack_statistic: qstatistic is ", qstatistic.scalar_type(),
                    ", expected uint8");
  return {qstatistic.bitwise_right_shift(4), qstatistic.bitwise_and(15)};
}

at::Tensor ops::pack_statistic(const at::Tensor& scale_codes, const at::Tensor& zero_codes) {
  for (const at::Tensor* t : {&scale_codes, &zero_codes}) {
    TORCH_CHECK_VALUE(t->scalar_type() == at::kByte && t->sizes() == scale_codes.sizes(), "pack_statistic: codes are ",
                      scale_codes.scalar_type(), " ", scale_codes.sizes(), " and ", zero_codes.scalar_type(), " ",
                      zero_codes.sizes(), ", expected uint8 of one shape");
    TORCH_CHECK_VALUE(t->numel() == 0 || t->max().item<int64_t>() <= 15, "pack_statistic: a code exceeds 15");
  }
  return scale_codes.bitwise_left_shift(4).bitwise_or(zero_codes);
}

namespace {

// ---- registration: results with absent parts as None

using ImportResult =
    std::tuple<at::Tensor, at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, std::string, int64_t>;

OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

ImportResult result_of(const ops::ImportedWeight& w) {
  return {w.codes,          w.scales,           optional(w.zeros), optional(w.offsets),
          optional(w.perm), optional(w.parent), w.format,          w.group_size};
}

#define SB_IMPORT_RESULT \
  "(Tensor codes, Tensor scales, Tensor? zeros, Tensor? offsets, Tensor? perm, Tensor? parent, str format, int group_size)"

TORCH_LIBRARY_FRAGMENT(subbyte, m) {
  m.def("gptq_unpack_zeros(Tensor qzeros, int bits, int out_features, int zeros_minus=1) -> Tensor", ops::gptq_unpack_zeros);
  m.def("gptq_pack_zeros(Tensor zeros, int bits, int zeros_minus=1, bool wrap=False) -> Tensor", ops::gptq_pack_zeros);
  m.def(
      "gptq_import(Tensor qweight, Tensor scales, Tensor? zeros, Tensor? qzeros, Tensor? g_idx, Tensor? q_perm, int bits, "
      "int in_features, int group_size, int zeros_minus=1) -> " SB_IMPORT_RESULT,
      [](const at::Tensor& qweight, const at::Tensor& scales, const OptionalTensor& zeros, const OptionalTensor& qzeros,
         const OptionalTensor& g_idx, const OptionalTensor& q_perm, int64_t bits, int64_t in_features, int64_t group_size,
         int64_t zeros_minus) {
        return result_of(
            ops::gptq_import(qweight, scales, zeros, qzeros, g_idx, q_perm, bits, in_features, group_size, zeros_minus));
      });
  m.def(
      "exl2_import(Tensor qweight, Tensor q_groups, Tensor scales, Tensor? zeros, Tensor? q_perm, int in_features) "
      "-> " SB_IMPORT_RESULT,
      [](const at::Tensor& qweight, const at::Tensor& q_groups, const at::Tensor& scales, const OptionalTensor& zeros,
         const OptionalTensor& q_perm,
         int64_t in_features) { return result_of(ops::exl2_import(qweight, q_groups, scales, zeros, q_perm, in_features)); });
  m.def(
      "exl2_import_map(Tensor qweight, Tensor q_group_map, int[] rows, Tensor scales, Tensor? zeros, Tensor? q_perm, "
      "int in_features) -> " SB_IMPORT_RESULT,
      [](const at::Tensor& qweight, const at::Tensor& q_group_map, at::IntArrayRef rows, const at::Tensor& scales,
         const OptionalTensor& zeros, const OptionalTensor& q_perm, int64_t in_features) {
        return result_of(ops::exl2_import_map(qweight, q_group_map, rows, scales, zeros, q_perm, in_features));
      });
  m.def("export_columns(" SB_PACKED_SCHEMA
        ", Tensor? parent, int groups, bool asym, bool input_order) "
        "-> (Tensor qweight, Tensor scales, Tensor zeros, Tensor row_groups)",
        [](SB_PACKED_PARAMS, const OptionalTensor& parent, int64_t groups, bool asym, bool input_order) {
          const ops::ExportedWeight w = ops::export_columns(SB_PACKED, parent, groups, asym, input_order);
          return std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(w.qweight, w.scales, w.zeros, w.row_groups);
        });
  m.def("q_groups_of(Tensor row_groups, str format) -> Tensor", ops::q_groups_of);
  m.def("make_group_map(Tensor q_groups, int num_qrows) -> Tensor", ops::make_group_map);
  m.def("rows_of_format(str format, int in_features) -> int[]", ops::rows_of_format);
  m.def("expand_second_level(Tensor codes, Tensor zeros, Tensor scales, int out_features, int dq_group_size) -> Tensor",
        ops::expand_second_level);
  m.def(
      "requantize_second_level(Tensor values, int levels, int dq_group_size, bool per_column, Tensor? kept_zeros=None, "
      "Tensor? kept_scales=None) -> (Tensor codes, Tensor zeros, Tensor scales)",
      ops::requantize_second_level);
  m.def("unpack_statistic(Tensor qstatistic) -> (Tensor scale_codes, Tensor zero_codes)", ops::unpack_statistic);
  m.def("pack_statistic(Tensor scale_codes, Tensor zero_codes) -> Tensor", ops::pack_statistic);
}

}  // namespace
}  // namespace subbyte
