"""The demo: SmolLM2-135M-Instruct imported exactly, re-quantized to 8, 4, 3, 2 and mixed bits, measured, and reported.

make demo                     on two cores some minutes; on a GPU where there is one
make demo DEMO_ARGS=--quick   one short window of text and fewer settings: does everything run?
"""

import argparse
import copy
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy
import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file

import subbyte

from . import measure, mixed, models, passages, report
from .twin import shuffled_twin

ROOT = Path(__file__).resolve().parent.parent.parent
EMBEDDING = {"bits": 8, "group_size": 32, "sym": True}  # the tied embedding and head, in every packed setting
QUESTION = "Why is the sky blue? Answer in two sentences."


def arguments():
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short window of text, fewer settings, short timings")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "demo_output", help="folder for report.html, results.json, the checkpoint"
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "core", help="CMake build folder with the C++ programs")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one, else cpu")
    return parser.parse_args()


class Demo:
    def __init__(self, args):
        self.args, self.quick = args, args.quick
        self.console = Console(width=None if sys.stdout.isatty() else 160)
        self.count, self.length = (1, 128) if self.quick else (4, 512)
        device = args.device or ("cuda" if torch.cuda.is_available() and subbyte.info()["has_cuda"] else "cpu")
        self.device = torch.device(device)
        self.rows, self.checks = [], []

    # ---- what it shows while it works

    def say(self, text):
        self.console.print(f"[dim]{time.monotonic() - self.began:5.0f} s[/]  {text}")

    def progress(self):
        return Progress(
            TextColumn("         {task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )

    def check(self, holds, text):
        self.checks.append({"holds": bool(holds), "text": text})
        self.say(f"[{'green' if holds else 'bold red'}]{'exact' if holds else 'NOT EXACT'}[/]  {text}")

    # ---- measurements of one model

    def perplexities(self, model, title):
        with self.progress() as progress:
            task = progress.add_task(title, total=sum(map(len, self.windows.values())))
            return {name: measure.perplexity(model, w, lambda: progress.advance(task)) for name, w in self.windows.items()}

    def speeds(self, model, suffix="", matrices=None):
        window = next(iter(self.windows.values()))[0]
        with self.console.status("         timing"):
            out = {
                "decode" + suffix: measure.decode_tokens_per_s(model, window, 8 if self.quick else 24),
                "prefill" + suffix: measure.prefill_tokens_per_s(model, window, 1 if self.quick else 2),
            }
            if matrices:
                out["matrices" + suffix] = measure.matrices_tokens_per_s(matrices, 1 if self.quick else 5)
        return out

    def matrices(self, model):
        return [*models.block_linears(model).values(), model.lm_head]

    def size(self, model):
        """Bytes in memory by part; tied weights count once."""
        parts, seen = dict.fromkeys(("codes_bytes", "affine_bytes", "embedding_bytes", "other_bytes"), 0), set()
        for name, parameter in model.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            packed = isinstance(parameter, subbyte.PackedWeight)
            if "embed_tokens" in name or "lm_head" in name:
                parts["embedding_bytes"] += parameter.nbytes
            elif packed:
                parts["codes_bytes"] += parameter.codes.nbytes
                parts["affine_bytes"] += parameter.nbytes - parameter.codes.nbytes
            elif parameter.dim() == 2:
                parts["codes_bytes"] += parameter.nbytes
            else:
                parts["other_bytes"] += parameter.nbytes
        return {**parts, "total_bytes": sum(parts.values())}

    def add_row(
        self,
        key,
        label,
        model,
        *,
        dense=False,
        imported=False,
        is_mixed=False,
        errors=None,
        perplexity=None,
        int8=True,
        sample=True,
    ):
        linears = models.block_linears(model)
        size = self.size(model)
        weights = sum(m.in_features * m.out_features for m in linears.values())
        row = {
            "key": key,
            "label": label,
            "dense": dense,
            "imported": imported,
            "mixed": is_mixed,
            "errors": errors or {},
            "size": size,
            "bits_per_weight": 8 * (size["codes_bytes"] + size["affine_bytes"]) / weights,
        }
        row["perplexity"] = perplexity or self.perplexities(model, label)
        row["speed"] = self.speeds(model, matrices=self.matrices(model))
        if sample and not (self.quick and dense):
            row["sample"] = measure.generate(model, self.tokenizer, QUESTION, 12 if self.quick else 60)
        if int8 and not dense:
            for module in linears.values():
                module.activation_bits = 8
            row["perplexity_a8"] = self.perplexities(model, f"{label}, x in int8")
            row["speed"] |= self.speeds(model, "_a8", self.matrices(model))
        self.rows.append(row)
        shown = ", ".join(f"{p:.2f}" for p in row["perplexity"].values())
        self.say(
            f"{label}: {row['bits_per_weight']:.2f} bits per weight, {size['total_bytes'] / 1e6:.0f} MB, perplexity {shown}, "
            f"{row['speed']['decode']:.1f} tokens/s"
        )
        return row

    # ---- the steps

    def run(self):
        self.began = time.monotonic()
        torch.manual_seed(0)
        self.say(f"subbyte {subbyte.info()['version']}, PyTorch {torch.__version__}, on {self.device}")
        with self.console.status("         loading SmolLM2-135M-Instruct"):
            model, self.tokenizer = models.load_dense()
            model = model.to(self.device)
            self.windows = {
                name: passages.windows(self.tokenizer, text, self.count, self.length)
                for name, text in passages.evaluation_texts().items()
            }
        self.say(
            f"SmolLM2-135M-Instruct: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights; "
            f"{self.count} windows of {self.length} tokens of {' and '.join(self.windows)}"
        )
        self.import_exactly(model)
        twin = self.make_twin(model)
        del model
        self.baselines(twin)
        self.quantized(twin)
        results = self.results()
        results["example"] = self.cpp_example(twin)
        results["seconds"] = time.monotonic() - self.began
        results["environment"]["demo took"] = f"{results['seconds']:.0f} s" + (" (--quick)" if self.quick else "")
        self.args.output.mkdir(parents=True, exist_ok=True)
        (self.args.output / "results.json").write_text(json.dumps(results, indent=1))
        (self.args.output / "table.md").write_text(self.markdown(results))
        report.write(results, self.args.output / "report.html")
        self.print_table()
        self.console.print(f"\n{self.args.output / 'report.html'}  ({results['seconds']:.0f} s)")
        return 0 if all(c["holds"] for c in self.checks) else 1

    def import_exactly(self, model):
        path = models.gguf_path()
        with self.console.status("         importing the packed weights"):
            reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
            weights = subbyte.load_gguf(path)
            packed = subbyte.model_from_gguf(path, device=self.device)
            compared = equal = 0
            for name, weight in weights.items():
                if isinstance(weight, subbyte.PackedWeight):
                    theirs = gguf.dequantize(reader[name].data, reader[name].tensor_type)
                    compared += 1
                    equal += numpy.array_equal(
                        weight.dequantize(torch.float32).numpy().view(numpy.uint32), theirs.view(numpy.uint32)
                    )
        self.check(
            compared == equal > 0,
            f"{equal} of {compared} packed tensors of the GGUF file dequantize bit for bit to what the gguf package reads",
        )
        dense_linears, same = models.block_linears(model), 0
        for name, module in models.block_linears(packed).items():
            same += torch.equal(module.weight.dequantize(torch.float32), dense_linears[name].weight)
        same += torch.equal(packed.lm_head.weight.dequantize(torch.float32), model.lm_head.weight)
        self.check(
            same == len(dense_linears) + 1,
            f"{same} of {len(dense_linears) + 1} matrices of the packed model hold exactly the float32 weights of transformers'"
            " own dequantized model",
        )
        window = next(iter(self.windows.values()))[0]
        ours, theirs = measure.logits_of(packed, window), measure.logits_of(model, window)
        difference = (ours - theirs).abs().max().item()
        self.check(
            difference < 2e-4 * theirs.abs().max().item(),
            f"its logits differ from that model's by at most {difference:.1e}, where logits reach {theirs.abs().max():.0f}:"
            " float32 rounding",
        )
        original = self.perplexities(model, "original")
        row = self.add_row("imported", "imported Q4_1", packed, imported=True, errors=dict.fromkeys(dense_linears, 0.0))
        digits = {name: (f"{original[name]:.4g}", f"{row['perplexity'][name]:.4g}") for name in original}
        self.check(
            all(a == b for a, b in digits.values()),
            "perplexity of the packed and of the original model: "
            + "; ".join(f"{name} {b} and {a}" for name, (a, b) in digits.items()),
        )
        four = copy.deepcopy(model)
        self.quantize(four, bits=4, group_size=32, scale_dtype=torch.float16)
        same = sum(
            torch.equal(m.weight.dequantize(torch.float32), dense_linears[n].weight)
            for n, m in models.block_linears(four).items()
        )
        self.check(
            same == len(dense_linears),
            f"quantizing the original again to 4 bits in groups of 32 gives {same} of {len(dense_linears)} "
            "matrices back exactly: they lie on Q4_1 grids, so this is no measure of quality",
        )
        self.original = original

    def make_twin(self, model):
        with self.console.status("         shuffling the channels"):
            twin = shuffled_twin(model)
            window = next(iter(self.windows.values()))[0]
            ours, theirs = measure.logits_of(twin, window), measure.logits_of(model, window)
        self.twin = {"max_difference": (ours - theirs).abs().max().item(), "largest_logit": theirs.abs().max().item()}
        self.check(
            self.twin["max_difference"] < 2e-4 * self.twin["largest_logit"],
            "the twin with shuffled channels is the same function: its logits differ by at most"
            f" {self.twin['max_difference']:.1e}",
        )
        return twin

    def baselines(self, twin):
        self.add_row("float32", "float32, dense", twin, dense=True)
        self.reference = self.rows[-1]["perplexity"]
        if not self.quick and computes_in_bfloat16(self.device):
            self.add_row("bfloat16", "bfloat16, dense", copy.deepcopy(twin).to(torch.bfloat16), dense=True, sample=False)

    def quantize(self, model, **packing):
        """Everything but norms; the head shares the embedding's weight, which keeps 8 bits."""
        packing["overrides"] = {**packing.get("overrides", {}), "model.embed_tokens": EMBEDDING, "lm_head": EMBEDDING}
        made = subbyte.quantize_(model, progress=False, **packing)
        return {layer.name: layer.error for layer in made if layer.name.startswith("model.layers.")}

    def quantized(self, twin):
        common = {"scale_dtype": torch.float16}
        settings = [
            ("8g64", "8 bits, g64", {"bits": 8, "group_size": 64}),
            ("4g32", "4 bits, g32", {"bits": 4, "group_size": 32}),
            ("4g64", "4 bits, g64", {"bits": 4, "group_size": 64}),
            ("3g64", "3 bits, g64", {"bits": 3, "group_size": 64}),
            ("2g64", "2 bits, g64", {"bits": 2, "group_size": 64}),
        ]
        if self.quick:
            settings = [s for s in settings if s[0] in ("8g64", "4g64", "2g64")]
        for key, label, packing in settings:
            model = copy.deepcopy(twin)
            errors = self.quantize(model, **packing, **common)
            self.add_row(key, label, model, errors=errors)
        self.mixed_settings(twin, common)

    def mixed_settings(self, twin, common):
        linears = models.block_linears(twin)
        texts = [
            passages.windows(self.tokenizer, text, 1 if self.quick else 4, 64 if self.quick else 128)
            for text in passages.calibration_text()
        ]
        windows = torch.cat(texts)
        with self.progress() as progress:
            task = progress.add_task("mixed width: sensitivity", total=len(windows) + len(linears))
            squares, energy = mixed.statistics(twin, linears, windows, lambda: progress.advance(task))
            rise = mixed.predicted_rise(linears, squares, lambda: progress.advance(task), group_size=64, **common)
        del squares
        widths = mixed.choose_widths(rise, {n: m.weight.numel() for n, m in linears.items()}, mean_bits=4.0)
        self.mixed = {"widths": list(mixed.WIDTHS), "histogram": mixed.histogram(widths), "calibration_tokens": windows.numel()}
        model = copy.deepcopy(twin)
        errors = self.quantize(model, bits=4, group_size=64, overrides={n: {"bits": b} for n, b in widths.items()}, **common)
        self.add_row("mixed", "mixed by matrix, g64", model, errors=errors, is_mixed=True)
        if self.quick:
            return
        model, errors = copy.deepcopy(twin), {}
        for name, module in models.block_linears(twin).items():
            perm = energy[name].argsort(descending=True).to(torch.int32)
            weight = subbyte.PackedWeight.from_float(
                module.weight, format=mixed.row_layout(module.in_features, 64), group_size=64, perm=perm, **common
            )
            errors[name] = measure.relative_error(weight.dequantize(torch.float32), module.weight)
            models.set_module(model, name, subbyte.nn.Linear.from_packed(weight, module.bias))
        self.quantize(model, bits=8)  # what is left: embedding and head
        self.add_row("mixed_rows", "8 + 4 bits in a row, g64", model, errors=errors, is_mixed=True)

    # ---- what becomes of it

    def by_key(self, key):
        return next(r for r in self.rows if r["key"] == key)

    def ratios(self, row, field="perplexity"):
        return " and ".join(f"{row[field][p] / self.reference[p]:.3g}" for p in self.windows)

    def results(self):
        dense, eight, four, two = map(self.by_key, ("float32", "8g64", "4g64", "2g64"))
        by_matrix = self.by_key("mixed")
        # Dense rows first, then the import, then the settings.
        self.rows.sort(key=lambda r: (not r["dense"], not r["imported"]))
        packed = [r for r in self.rows if not r["dense"]]
        fastest = max(packed, key=lambda r: max(r["speed"]["decode"], r["speed"]["decode_a8"]))
        smaller = dense["size"]["total_bytes"] / four["size"]["total_bytes"]
        matrix_ratio = max(four["speed"]["matrices"], four["speed"]["matrices_a8"]) / dense["speed"]["matrices"]
        texts = {
            "quality": (
                f"Perplexity grows by the factors {self.ratios(eight)} ({' and '.join(self.windows)}) at 8 bits,"
                f" {self.ratios(four)} at 4 bits in groups of 64, and {self.ratios(two)} at 2 bits. All uniform settings round"
                " to the nearest level and see no data. A factor of 10 or more means that the model no longer works: 2 and 3"
                " bits need training or a calibrated method, and this page shows what happens without. Hollow marks: x"
                " quantized to 8 bits as well (linear_a8)."
            ),
            "mixed": (
                f"Mixed by matrix: each of the {len(by_matrix['errors'])} matrices gets 2, 3, 4, 5, 6 or 8 bits so that the"
                " predicted rise of the loss is smallest at a mean of 4 bits. The prediction uses squared gradients over"
                f" {self.mixed['calibration_tokens']} tokens of other texts (Genesis, fortunes `people`). At"
                f" {by_matrix['bits_per_weight']:.2f} bits per weight the factors are {self.ratios(by_matrix)}, against"
                f" {self.ratios(four)} for 4 bits everywhere at {four['bits_per_weight']:.2f}. How many matrices of each kind"
                " got which width:"
            ),
            "error": (
                "The line is the mean over the 7 matrices of a block, the band goes from the smallest to the largest. One bit"
                " less about doubles the error. Error of the weights alone does not rank settings: which weights carry it"
                " decides, see the mixed settings."
            ),
            "size": (
                "The embedding, tied to the head, holds a fifth of the weights and keeps 8 bits in every packed setting. At 4"
                f" bits in groups of 64 the model takes {four['size']['total_bytes'] / 1e6:.0f} MB instead of"
                f" {dense['size']['total_bytes'] / 1e6:.0f} MB, {smaller:.1f} times less."
            ),
            "speed": (
                "Decoding one token reads every weight once, so packed weights should be fast: the matrices alone run"
                f" {matrix_ratio:.1f} times as fast at 4 bits as dense float32 ones. End to end a large part of each token is"
                " transformers' Python code and attention, which packing does not touch. Timings are the best of a few runs on"
                " a machine that may have been doing other things."
            ),
        }
        if "mixed_rows" in [r["key"] for r in self.rows]:
            rows = self.by_key("mixed_rows")
            texts["mixed"] = (
                "8 + 4 bits in a row: the input channels with the most energy over the same text are stored first, in 8 bits,"
                f" the others in 4. At {rows['bits_per_weight']:.2f} bits per weight the factors are {self.ratios(rows)}. "
                + texts["mixed"]
            )
        tiles = [
            {"value": f"{smaller:.1f} × smaller", "text": "in memory at 4 bits, groups of 64, than float32"},
            {
                "value": f"× {self.ratios(eight).replace(' and ', ' / ')}",
                "text": f"perplexity at 8 bits ({' / '.join(self.windows)})",
            },
            {
                "value": f"× {self.ratios(by_matrix).replace(' and ', ' / ')}",
                "text": f"perplexity with mixed widths at {by_matrix['bits_per_weight']:.1f} bits per weight",
            },
            {
                "value": f"{max(fastest['speed']['decode'], fastest['speed']['decode_a8']):.0f} tokens/s",
                "text": f"decoding, {fastest['label']}; dense float32 {dense['speed']['decode']:.0f}",
            },
        ]
        return {
            "model": {"name": "SmolLM2-135M-Instruct", "file": models.FILE, "matrices": len(by_matrix["errors"])},
            "passages": {name: {"windows": len(w), "length": w.shape[1]} for name, w in self.windows.items()},
            "question": QUESTION,
            "checks": self.checks,
            "original_perplexity": self.original,
            "twin": self.twin,
            "mixed": self.mixed,
            "rows": self.rows,
            "tiles": tiles,
            "texts": texts,
            "environment": environment(self.device),
        }

    def cpp_example(self, twin):
        """Writes a 4-bit checkpoint of the twin and runs the C++ example on it."""
        checkpoint = self.args.output / "smollm2-4bit.safetensors"
        self.args.output.mkdir(parents=True, exist_ok=True)
        with (
            self.console.status("         writing a checkpoint, running the C++ example"),
            tempfile.TemporaryDirectory() as folder,
        ):
            source = Path(folder) / "model.safetensors"
            save_file({n: p.detach().cpu().contiguous() for n, p in twin.named_parameters()}, source, metadata={"format": "pt"})
            program = self.args.build / "subbyte" / "cli" / "subbyte"
            command([program, "quantize", source, checkpoint, "--bits", "4", "--group-size", "64"])
            output = command([self.args.build / "examples" / "run_checkpoint", checkpoint])
        self.say(f"C++ example ran on {checkpoint.name}")
        return {
            "output": output.strip(),
            "text": (
                f"`subbyte quantize` (C++, no torch) wrote {checkpoint.name}, {checkpoint.stat().st_size / 1e6:.0f} MB; "
                "examples/run_checkpoint.cc loaded it and ran its packed layers:"
            ),
        }

    def markdown(self, results):
        """The table as it stands in the README."""
        environment = results["environment"]
        lines = [
            (
                f"SmolLM2-135M-Instruct, {environment['processor']}, {environment['date']}, PyTorch {environment['PyTorch']}"
                " (`make demo`):"
            ),
            "",
            "| setting | bits/weight | model MB | "
            + " | ".join(f"perplexity {p}" for p in self.windows)
            + " | with int8 x | decode tokens/s | int8 x | prompt tokens/s | int8 x |",
            "|---|" + "---:|" * (7 + len(self.windows)),
        ]
        for row in self.rows:
            a8, speed = row.get("perplexity_a8"), row["speed"]
            cells = [
                row["label"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['size']['total_bytes'] / 1e6:.0f}",
                *[f"{v:.2f}" for v in row["perplexity"].values()],
                " / ".join(f"{v:.2f}" for v in a8.values()) if a8 else "",
                f"{speed['decode']:.1f}",
                f"{speed['decode_a8']:.1f}" if a8 else "",
                f"{speed['prefill']:.0f}",
                f"{speed['prefill_a8']:.0f}" if a8 else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def print_table(self):
        table = Table(
            box=box.SIMPLE_HEAD, title="SmolLM2-135M-Instruct; quality rows on the shuffled twin", title_justify="left"
        )
        columns = [
            "setting",
            "bits/w",
            "MB",
            *[f"ppl {p}" for p in self.windows],
            "int8 x",
            "decode t/s",
            "int8 x",
            "prompt t/s",
            "int8 x",
        ]
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
        for row in self.rows:
            a8 = row.get("perplexity_a8")
            speed = row["speed"]
            table.add_row(
                row["label"],
                f"{row['bits_per_weight']:.2f}",
                f"{row['size']['total_bytes'] / 1e6:.0f}",
                *[f"{v:.2f}" for v in row["perplexity"].values()],
                " ".join(f"{v:.2f}" for v in a8.values()) if a8 else "",
                f"{speed['decode']:.1f}",
                f"{speed['decode_a8']:.1f}" if a8 else "",
                f"{speed['prefill']:.0f}",
                f"{speed['prefill_a8']:.0f}" if a8 else "",
            )
        Console(width=max(self.console.width, 132)).print(table)


def command(argv):
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def computes_in_bfloat16(device):
    """PyTorch emulates bfloat16 on other processors, several times slower than float32: no baseline for anything."""
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    return device.type == "cuda" or "avx512_bf16" in flags or "amx_bf16" in flags


def environment(device):
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = lines[0].partition(":")[2].strip() if lines else processor
    info = subbyte.info()
    out = {"processor": f"{processor}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        out["processor"] = f"{torch.cuda.get_device_name(device)} ({out['processor']})"
    if not computes_in_bfloat16(device):
        out["bfloat16 baseline"] = (
            "left out: the processor has no bfloat16 instructions, PyTorch emulates them more slowly than float32"
        )
    return out | {
        "date": datetime.date.today().isoformat(),
        "instruction sets": (
            f"PyTorch uses {torch.backends.cpu.get_cpu_capability()}; subbyte the best it has kernels for"
            + (f", forced to {forced}" if (forced := os.environ.get("SUBBYTE_FORCE_ISA")) else "")
        ),
        "subbyte": f"{info['version']}, built with PyTorch {info['built_with']}",
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(Demo(arguments()).run())
