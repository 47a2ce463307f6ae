// subbyte quantize and subbyte convert: a model file becomes a native checkpoint, block of rows by block of rows. Memory is a
// few blocks (kBlockBytes) plus the file's header, whatever the model's size: pages of the input are given back after use.
#include <fmt/format.h>
#include <fnmatch.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>

#include "subbyte/base/error.h"
#include "subbyte/base/parallel_for.h"
#include "subbyte/cli/commands.h"
#include "subbyte/io/json_events.h"
#include "subbyte/io/model_file.h"
#include "subbyte/ops/dequantize/dequantize.h"
#include "subbyte/ops/quantize/quantize.h"

namespace subbyte::cli {
namespace {

constexpr int64_t kBlockBytes = int64_t(8) << 20;  // of float32 values; large enough that calls cost nothing

struct Rule {
  std::string format;
  int64_t group_size = 0;  // 0: one group a row
};

struct Options {
  std::string input, output;
  int bits = 0;
  std::string format, group_size = "64", scheme, zero_kind, scale_dtype = "float16", rounding = "nearest";
  bool sym = false, requantize = false, quiet = false, progress = false;
  std::vector<std::string> skip, only, overrides;
  uint64_t seed = 0;
  int threads = 0;
};

// A number of columns, or "row".
int64_t parse_group_size(const std::string& text) {
  if (text == "row") return 0;
  int64_t v = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), v);
  if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size() || v < 1)
    throw UsageError("group size '" + text + "' is neither a positive number nor 'row'");
  return v;
}

// A format's name, or a mixed row such as "uint8*64+uint4*448"; whether its columns add up shows with each tensor.
std::string checked_format(const std::string& text) {
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('+', begin), text.size());
    const std::string segment = text.substr(begin, end - begin);
    try {
      format_from_name(segment.substr(0, segment.find('*')));
    } catch (const std::invalid_argument& e) {
      throw UsageError(e.what());
    }
    begin = end + 1;
  }
  return text;
}

// An interrupted run ends as a failed one does: the writer's temporary file goes.
volatile std::sig_atomic_t interrupting_signal = 0;

class InterruptGuard {
 public:
  InterruptGuard() {
    interrupting_signal = 0;
    struct sigaction action = {};
    action.sa_handler = [](int signal) { interrupting_signal = signal; };
    for (int i = 0; i < kCount; ++i) ::sigaction(kSignals[i], &action, &before_[i]);
  }
  ~InterruptGuard() {
    for (int i = 0; i < kCount; ++i) ::sigaction(kSignals[i], &before_[i], nullptr);
  }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;
  static void check() {
    if (interrupting_signal != 0) throw std::runtime_error("interrupted; nothing was written");
  }

 private:
  static constexpr int kCount = 3;
  static constexpr int kSignals[kCount] = {SIGINT, SIGTERM, SIGHUP};
  struct sigaction before_[kCount];
};

bool matches(const std::vector<std::string>& patterns, const std::string& name) {
  for (const std::string& p : patterns)
    if (::fnmatch(p.c_str(), name.c_str(), 0) == 0) return true;
  return false;
}

class Plan {
 public:
  explicit Plan(const Options& o) : options_(o) {
    if (!o.format.empty() && o.bits != 0) throw UsageError("--bits and --format exclude each other");
    default_group_size_ = parse_group_size(o.group_size);
    if (!o.format.empty()) default_ = Rule{checked_format(o.format), default_group_size_};
    if (o.bits != 0) default_ = Rule{format_name(format_from_bits(o.bits)), default_group_size_};
    for (const std::string& text : o.overrides) {
      const size_t equals = text.rfind('=');
      if (equals == std::string::npos || equals == 0)
        throw UsageError("override '" + text + "' is not PATTERN=FORMAT[,group_size]");
      std::string format = text.substr(equals + 1);
      int64_t group_size = default_group_size_;
      if (const size_t comma = format.find(','); comma != std::string::npos) {
        group_size = parse_group_size(format.substr(comma + 1));
        format = format.substr(0, comma);
      }
      overrides_.emplace_back(text.substr(0, equals), Rule{checked_format(format), group_size});
    }
    try {
      if (!o.scheme.empty()) scheme_ = scheme_from_name(o.scheme);
      rounding_ = rounding_from_name(o.rounding);
    } catch (const std::invalid_argument& e) {
      throw UsageError(e.what());
    }
    if (!o.zero_kind.empty())
      zero_kind_ = o.zero_kind == "fixed" ? ZeroKind::kFixed : o.zero_kind == "zeros" ? ZeroKind::kZeros : ZeroKind::kOffsets;
    if (o.sym) {
      if (zero_kind_ && *zero_kind_ != ZeroKind::kFixed) throw UsageError("--sym means --zero-kind fixed");
      zero_kind_ = ZeroKind::kFixed;
    }
    const bool mid_rise = scheme_ == Scheme::kMidRise || scheme_ == Scheme::kFanIn;
    if (zero_kind_ && mid_rise)
      throw UsageError("schemes midrise and fan_in decide about the zero: leave --zero-kind and --sym out");
    if (zero_kind_ && scheme_ && (*scheme_ == Scheme::kMinMax) != (*zero_kind_ != ZeroKind::kFixed))
      throw UsageError("scheme minmax needs --zero-kind zeros or offsets; absmax and absmean need fixed");
    scale_dtype_ = o.scale_dtype == "float32" ? DType::kF32 : o.scale_dtype == "bfloat16" ? DType::kBF16 : DType::kF16;
  }

  bool quantizes() const { return default_.has_value() || !overrides_.empty(); }
  Rounding rounding() const { return rounding_; }

  // What becomes of a tensor; nothing: it is copied, or passes through packed as it is. A pattern that matches any of its names
  // matches it.
  std::optional<PackedSpec> target(const ModelTensor& t, const std::vector<std::string>& tied_names) const {
    const auto matches_any = [&](const std::vector<std::string>& patterns) {
      return matches(patterns, t.name) ||
             std::any_of(tied_names.begin(), tied_names.end(), [&](const std::string& n) { return matches(patterns, n); });
    };
    if (t.shape.size() != 2 || matches_any(options_.skip)) return {};
    DType dtype;
    if (t.dtype && !element_type_to_dtype(*t.dtype, &dtype)) return {};
    if (t.spec && !options_.requantize) return {};
    const Rule* rule = nullptr;
    if (default_ && (options_.only.empty() || matches_any(options_.only))) rule = &*default_;
    for (const auto& [pattern, override_rule] : overrides_)
      if (matches_any({pattern})) rule = &override_rule;  // the last one wins
    if (rule == nullptr) return {};
    PackedSpec s;
    s.name = t.name;
    s.n = t.shape[0];
    s.k = t.shape[1];
    try {
      s.layout = row_layout(rule->format, s.k);
    } catch (const std::invalid_argument& e) {
      throw UsageError("tensor '" + t.name + "': " + e.what());
    }
    s.group_size = rule->group_size == 0 ? std::max<int64_t>(s.k, 1) : rule->group_size;
    for (int i = 0; i + 1 < s.layout.segment_count; ++i)
      if (const int64_t end = s.layout.segments[i].k_begin + s.layout.segments[i].k_count; end % s.group_size != 0)
        throw UsageError(fmt::format("tensor '{}': a segment of {} ends at column {}, inside a group of {}", t.name,
                                     rule->format, end, s.group_size));
    s.scale_dtype = s.zero_dtype = scale_dtype_;
    s.zero_kind = zero_kind_.value_or(ZeroKind::kOffsets);
    if (!scheme_takes(scheme_of(s.layout), s.zero_kind, s.layout)) s.zero_kind = ZeroKind::kFixed;
    if (!scheme_takes(scheme_of(s.layout), s.zero_kind, s.layout)) s.zero_kind = ZeroKind::kZeros;  // midrise, fan_in
    return s;
  }

  // Patterns that match no name in the model, each with its option.
  std::vector<std::pair<std::string, std::string>> unmatched(const ModelFile& model) const {
    std::vector<std::pair<std::string, std::string>> out;
    const auto judge = [&](const char* option, const std::string& pattern) {
      const bool found = std::any_of(model.tensors().begin(), model.tensors().end(),
                                     [&](const ModelTensor& t) { return matches({pattern}, t.name); }) ||
                         std::any_of(model.tied().begin(), model.tied().end(),
                                     [&](const auto& names) { return matches({pattern}, names.first); });
      if (!found) out.emplace_back(option, pattern);
    };
    for (const std::string& p : options_.skip) judge("--skip", p);
    for (const std::string& p : options_.only) judge("--only", p);
    for (const auto& [pattern, rule] : overrides_) judge("--override", pattern);
    return out;
  }

  Scheme scheme_of(const RowLayout& layout) const {
    if (scheme_) return *scheme_;
    const bool coarse = std::all_of(layout.segments.begin(), layout.segments.begin() + layout.segment_count,
                                    [](const Segment& s) { return s.format == Format::kSign || s.format == Format::kTernary; });
    if (zero_kind_) return *zero_kind_ != ZeroKind::kFixed ? Scheme::kMinMax : coarse ? Scheme::kAbsMean : Scheme::kAbsMax;
    return coarse ? Scheme::kAbsMean : Scheme::kMinMax;
  }

 private:
  const Options& options_;
  int64_t default_group_size_ = 0;
  std::optional<Rule> default_;
  std::vector<std::pair<std::string, Rule>> overrides_;
  std::optional<Scheme> scheme_;
  std::optional<ZeroKind> zero_kind_;
  DType scale_dtype_ = DType::kF16;
  Rounding rounding_ = Rounding::kNearest;
};

class ProgressBar {
 public:
  ProgressBar(bool shown, int64_t total) : shown_(shown), total_(std::max<int64_t>(total, 1)) {}
  ~ProgressBar() {
    if (drawn_) fmt::print(stderr, "\r{:80}\r", "");
  }
  void advance(int64_t amount, const std::string& name) {
    done_ += amount;
    const auto now = std::chrono::steady_clock::now();
    if (!shown_ || (drawn_ && done_ < total_ && now - last_ < std::chrono::milliseconds(100))) return;
    last_ = now;
    drawn_ = true;
    constexpr int kWidth = 30;
    const double share = double(done_) / double(total_);
    const int filled = int(share * kWidth);
    const std::string shown_name = printable(name);
    fmt::print(stderr, "\r[{:#<{}}{:.<{}}] {:3.0f} % {:<40.40}", "", filled, "", kWidth - filled, share * 100, shown_name);
    std::fflush(stderr);
  }

 private:
  bool shown_, drawn_ = false;
  int64_t total_, done_ = 0;
  std::chrono::steady_clock::time_point last_;
};

std::map<std::string, std::string> metadata_of(const ModelFile& model) {
  std::map<std::string, std::string> out;
  if (model.gguf() == nullptr) {
    out = model.checkpoint()->file().metadata();
    out.erase("subbyte");
    out.erase("format");
    return out;
  }
  // Scalars and strings travel as text; arrays (vocabularies) stay behind: safetensors metadata is no place for them.
  for (const auto& [key, value] : model.gguf()->values()) {
    if (std::holds_alternative<GgufArray>(value.value)) continue;
    const std::string text = std::visit(
        [](const auto& v) -> std::string {
          using T = std::decay_t<decltype(v)>;
          if constexpr (std::is_same_v<T, GgufArray>) return "";
          else if constexpr (std::is_same_v<T, std::string_view>) return std::string(v);
          else return fmt::format("{}", v);
        },
        value.value);
    try {
      json_quoted(key, "key");
      json_quoted(text, "value");
    } catch (const std::invalid_argument&) {
      continue;  // not UTF-8: safetensors cannot hold it
    }
    out.emplace("gguf." + key, text);
  }
  return out;
}

struct Totals {
  int64_t quantized = 0, passed = 0, copied = 0, bytes_in = 0, bytes_out = 0, weights = 0, packed_weights = 0, packed_bytes = 0;
};

void run(const Options& o, bool convert_only) {
  const Plan plan(o);
  if (!convert_only && !plan.quantizes())
    throw UsageError("quantize needs --bits, --format or --override; 'convert' packs without it");
  if (o.threads > 0) set_num_threads(o.threads);
  const auto start = std::chrono::steady_clock::now();
  const auto model = ModelFile::open(o.input);
  std::error_code ignored;
  if (std::filesystem::is_directory(o.output, ignored)) throw IoError(o.output + ": is a folder, expected a file name");

  // Everything is judged before anything is written.
  std::vector<TensorDeclaration> dense;
  std::vector<PackedSpec> packed;
  struct Job {
    size_t tensor, index;
    bool packed, quantized;
  };
  std::vector<Job> jobs;
  Totals totals;
  std::vector<std::vector<std::string>> tied_names(model->tensors().size());
  for (const auto& [name, other] : model->tied()) tied_names[size_t(model->find(other))].push_back(name);
  for (size_t i = 0; i < model->tensors().size(); ++i) {
    const ModelTensor& t = model->tensors()[i];
    totals.bytes_in += t.bytes;
    if (!t.spec && !t.dtype) model->load(i);  // throws, naming the type
    if (const auto target = plan.target(t, tied_names[i])) {
      jobs.push_back({i, packed.size(), true, true});
      packed.push_back(*target);
    } else if (t.spec) {
      jobs.push_back({i, packed.size(), true, false});
      packed.push_back(*t.spec);
    } else {
      jobs.push_back({i, dense.size(), false, false});
      dense.push_back({t.name, *t.dtype, t.shape});
      totals.bytes_out += t.bytes;
    }
  }
  for (const PackedSpec& s : packed) {
    totals.bytes_out += s.bytes();
    totals.packed_bytes += s.bytes();
    totals.packed_weights += s.n * s.k;
  }

  for (const auto& [option, pattern] : plan.unmatched(*model))
    if (!o.quiet) fmt::print(stderr, "subbyte: note: {} '{}' matches no tensor\n", option, printable(pattern));

  const InterruptGuard interrupts;
  CheckpointWriter writer(o.output, dense, packed, metadata_of(*model), model->tied());
  ProgressBar bar(!o.quiet && (o.progress || ::isatty(2) != 0), totals.bytes_in);
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<float> values;
  using Part = CheckpointWriter::Part;
  for (const Job& job : jobs) {
    const ModelTensor& t = model->tensors()[job.tensor];
    (job.quantized ? totals.quantized : job.packed ? totals.passed : totals.copied) += 1;
    const int64_t rows = model->rows(job.tensor);
    const int64_t row_bytes = rows > 0 ? t.bytes / rows : 0;
    const int64_t columns = t.shape.size() == 2 ? t.shape[1] : 0;
    const int64_t step = std::max<int64_t>(1, kBlockBytes / std::max<int64_t>({row_bytes, columns * 4, 1}));
    bool perm_written = false;
    for (int64_t begin = 0; begin < rows; begin += step) {
      InterruptGuard::check();
      const int64_t end = std::min(begin + step, rows), count = end - begin;
      const LoadedTensor block = model->load_rows(job.tensor, begin, end);
      const auto* from_packed = std::get_if<PackedTensor>(&block);
      const auto* from_dense = std::get_if<DenseTensor>(&block);
      if (!job.packed) {
        writer.append_dense(job.index, from_dense->bytes.data(), uint64_t(from_dense->bytes.size()));
      } else if (!job.quantized) {
        writer.append_packed(job.index, Part::kCodes, from_packed->codes.data(), uint64_t(from_packed->codes.size()));
        writer.append_packed(job.index, Part::kScales, from_packed->scales.data(), uint64_t(from_packed->scales.size()));
        if (from_packed->spec.zero_kind != ZeroKind::kFixed)
          writer.append_packed(job.index, Part::kZeros, from_packed->zeros.data(), uint64_t(from_packed->zeros.size()));
        if (from_packed->spec.has_perm && !perm_written)
          writer.append_packed(job.index, Part::kPerm, from_packed->perm.data(), uint64_t(from_packed->perm.size()));
        perm_written = true;
        if (from_packed->spec.residual_bits > 0)
          writer.append_packed(job.index, Part::kResidual, from_packed->residual.data(),
                               uint64_t(from_packed->residual.size()));
      } else {
        PackedSpec spec = packed[job.index];
        spec.n = count;
        QuantizeParams q;
        if (from_packed != nullptr) {
          values.resize(size_t(count * spec.k));
          DequantizeParams d;
          d.w = from_packed->view();
          d.out = values.data();
          d.out_stride = spec.k;
          dequantize(d);
          q.w = values.data();
        } else {
          q.w = from_dense->bytes.data();
          element_type_to_dtype(from_dense->dtype, &q.w_dtype);
        }
        codes.resize(size_t(spec.codes_bytes()));
        scales.resize(size_t(spec.scales_bytes()));
        zeros.resize(size_t(spec.zeros_bytes()));
        q.w_stride = spec.k;
        q.out.layout = spec.layout;
        q.out.n = count;
        q.out.k = spec.k;
        q.out.group_size = spec.group_size;
        q.out.scale_dtype = spec.scale_dtype;
        q.out.zero_dtype = spec.zero_dtype;
        q.out.zero_kind = spec.zero_kind;
        q.codes = codes.data();
        q.scales = scales.data();
        q.zeros = spec.zero_kind == ZeroKind::kFixed ? nullptr : zeros.data();
        q.scheme = plan.scheme_of(spec.layout);
        q.rounding = plan.rounding();
        q.seed = o.seed;
        q.offset = job.tensor;
        q.first_row = uint64_t(begin);
        try {
          quantize(q);
        } catch (const std::invalid_argument& e) {
          throw std::runtime_error(fmt::format("{}: tensor '{}', rows {} to {} (w[0, ...] is row {}): {}", o.input, t.name,
                                               begin, end - 1, begin, e.what()));
        }
        writer.append_packed(job.index, Part::kCodes, codes.data(), codes.size());
        writer.append_packed(job.index, Part::kScales, scales.data(), scales.size());
        if (spec.zero_kind != ZeroKind::kFixed) writer.append_packed(job.index, Part::kZeros, zeros.data(), zeros.size());
      }
      model->release_rows(job.tensor, begin, end);
      bar.advance(count * row_bytes, t.name);
    }
    // A weight without rows still has its permutation.
    if (job.packed && packed[job.index].has_perm && !perm_written) {
      const auto all = std::get<PackedTensor>(model->load(job.tensor));
      writer.append_packed(job.index, Part::kPerm, all.perm.data(), uint64_t(all.perm.size()));
    }
  }
  InterruptGuard::check();
  writer.finish();
  if (o.quiet) return;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print("{}\n", printable(o.output));
  for (const Job& job : jobs) {
    if (!job.quantized) continue;
    const PackedSpec& s = packed[job.index];
    fmt::print("  quantized {} {} to {}, groups of {}\n", printable(s.name), shape_text(std::vector<int64_t>{s.n, s.k}),
               s.layout.name(), s.group_size);
  }
  fmt::print("{} weights quantized, {} packed weights passed through exactly, {} tensors copied\n", totals.quantized,
             totals.passed, totals.copied);
  fmt::print("{} -> {}", bytes_text(totals.bytes_in), bytes_text(totals.bytes_out));
  if (totals.packed_weights > 0)
    fmt::print("; packed weights at {:.3f} bits each", double(totals.packed_bytes) * 8 / double(totals.packed_weights));
  fmt::print("; {:.1f} s, peak memory {}\n", seconds, bytes_text(peak_memory_bytes()));
}

void add_common(CLI::App* c, Options& o) {
  c->add_option("IN", o.input, "safetensors (file, index.json or folder), native checkpoint, or GGUF")->required();
  c->add_option("OUT", o.output, "Native checkpoint to write; appears complete or not at all")->required();
  c->add_flag("--quiet,-q", o.quiet, "Print nothing but errors");
  c->add_flag("--progress", o.progress, "Draw the progress bar even when standard error is no terminal");
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* q = app.add_subcommand("quantize", "Pack the 2-D weights of a model into 1 to 8 bits; other tensors are copied");
  add_common(q, *o);
  q->add_option("--bits,-b", o->bits, "Bits of a code: 1 (sign) to 8")->check(CLI::Range(1, 8));
  q->add_option("--format,-f", o->format,
                "Instead of --bits: sign, ternary, uint2 ... uint8, or a mixed row such as uint8*64+uint4*448");
  q->add_option("--group-size,-g", o->group_size, "Columns that share a scale, or 'row'")->capture_default_str();
  q->add_option("--scheme", o->scheme,
                "minmax, absmax, absmean, midrise or fan_in (default: minmax; absmean for sign and ternary; absmax with "
                "--sym)");
  q->add_option("--zero-kind", o->zero_kind, "fixed, zeros (units of codes) or offsets (units of values; default with minmax)")
      ->check(CLI::IsMember({"fixed", "zeros", "offsets"}));
  q->add_flag("--sym", o->sym, "Symmetric: --zero-kind fixed");
  q->add_option("--scale-dtype", o->scale_dtype, "float16, bfloat16 or float32, also of zeros and offsets")
      ->check(CLI::IsMember({"float16", "bfloat16", "float32"}))
      ->capture_default_str();
  q->add_option("--skip", o->skip, "Name patterns (* ? []) of tensors to leave as they are")->expected(1, -1);
  q->add_option("--only", o->only, "Name patterns of the tensors to quantize (default: all)")->expected(1, -1);
  q->add_option("--override", o->overrides, "PATTERN=FORMAT[,group_size] for some tensors; the last match wins")
      ->expected(1, -1);
  q->add_flag("--requantize", o->requantize,
              "Quantize weights anew that are already packed (GGUF Q types, native checkpoints)");
  q->add_option("--rounding", o->rounding, "nearest or stochastic")
      ->check(CLI::IsMember({"nearest", "stochastic"}))
      ->capture_default_str();
  q->add_option("--seed", o->seed, "Of stochastic rounding")->capture_default_str();
  q->add_option("--threads,-t", o->threads, "Threads (default: SUBBYTE_NUM_THREADS, else all)")->check(CLI::Range(1, 4096));
  q->callback([o] { run(*o, false); });

  auto c_options = std::make_shared<Options>();
  CLI::App* c =
      app.add_subcommand("convert", "Write a native checkpoint with every value as it is: GGUF Q4_0, Q4_1, Q8_0 exactly");
  add_common(c, *c_options);
  c->callback([c_options] { run(*c_options, true); });
}

}  // namespace subbyte::cli
