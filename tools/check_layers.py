#!/usr/bin/env python3
"""Refuses #include lines that point upwards. The order of the parts, lowest first:

  subbyte/base  <-  subbyte/formats  <-  subbyte/ops, subbyte/io  <-  subbyte/cli      ops and io do not include each other
  subbyte/  <-  subbyte_torch/  <-  python/            the core knows neither torch nor Python, the LibTorch layer not Python
  only subbyte_torch/convert.{h,cpp} says data_ptr

  check_layers.py [ROOT]      checks the files of git, or all files where ROOT is no git repository
  check_layers.py --self-test proves on a made-up tree that each rule can fail
"""
import pathlib
import re
import subprocess
import sys
import tempfile

SUFFIXES = {".h", ".hpp", ".cuh", ".inc", ".cc", ".cpp", ".cu"}
# What each part of the core may include of the core.
ALLOWED = {
    "base": {"base"},
    "formats": {"base", "formats"},
    "ops": {"base", "formats", "ops"},
    "io": {"base", "formats", "io"},
    "cli": {"base", "formats", "ops", "io", "cli"},
}
TORCH = re.compile(r"(torch|ATen|c10|caffe2)/|torch\.h$")
PYTHON = re.compile(r"(.*/)?Python\.h$|pybind11/|nanobind/")
INCLUDE = re.compile(r'^\s*#\s*include(?:_next)?\s*[<"]([^>"]+)[>"]')


def sources(root):
    done = subprocess.run(["git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard"], capture_output=True, text=True)
    names = done.stdout.splitlines() if done.returncode == 0 else [str(p.relative_to(root)) for p in sorted(root.rglob("*"))]
    return [n for n in names if pathlib.PurePath(n).suffix in SUFFIXES and n.startswith(("subbyte/", "subbyte_torch/"))
            and (root / n).is_file()]


def without_comments(text):
    """Comments become spaces; line numbers stay. String literals are left alone."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.S)
    return pattern.sub(lambda m: m.group() if m.group()[0] == '"' else re.sub(r"[^\n]", " ", m.group()), text)


def violations_of(name, text):
    parts = name.split("/")
    core = parts[0] == "subbyte"
    layer = parts[1] if core and len(parts) > 2 else None
    out = []
    if core and layer not in ALLOWED:
        out.append((1, "belongs to no part of the core: " + ", ".join(ALLOWED)))
    for number, line in enumerate(without_comments(text).splitlines(), 1):
        if (m := INCLUDE.match(line)) is not None:
            target = m.group(1)
            if core and TORCH.match(target):
                out.append((number, f"the core includes torch: {target}"))
            elif core and target.startswith(("subbyte_torch/", "python/")):
                out.append((number, f"the core includes what stands above it: {target}"))
            elif PYTHON.match(target):
                out.append((number, f"C++ includes Python: {target}"))
            elif target.startswith(".") or "/../" in target:
                out.append((number, f"a relative include hides its layer: {target}"))
            elif layer in ALLOWED and target.startswith("subbyte/"):
                other = target.split("/")[1]
                if other not in ALLOWED[layer]:
                    out.append((number, f"{layer} may not include {other}: {target}"))
        if not core and not re.fullmatch(r"subbyte_torch/convert\.(h|cpp)", name) and re.search(r"\b(?:const_|mutable_)?data_ptr\b", line):
            out.append((number, "data_ptr outside subbyte_torch/convert.{h,cpp}"))
    return out


def check(root):
    """(files read, messages)"""
    names = sources(root)
    messages = []
    for name in names:
        text = (root / name).read_text(encoding="utf-8")
        messages += [f"{name}:{number}: {what}" for number, what in violations_of(name, text)]
    return len(names), messages


def self_test():
    good = {
        "subbyte/base/a.h": "#include <vector>\n",
        "subbyte/formats/b.h": '#include "subbyte/base/a.h"\n',
        "subbyte/ops/x/x.cc": '#include "subbyte/formats/b.h"\n#include "subbyte/ops/y/y.h"\n// #include <torch/torch.h>\n',
        "subbyte/io/r.cc": '#include "subbyte/formats/b.h"\n#include <nlohmann/json.hpp>\n',
        "subbyte/cli/main.cc": '#include "subbyte/io/r.h"\n#include "subbyte/ops/x/x.h"\n/*\n#include <Python.h>\n*/\n',
        "subbyte_torch/convert.cpp": "#include <ATen/ATen.h>\nvoid* p = t.data_ptr();\n",
        "subbyte_torch/ops/x.cpp": '#include "subbyte/ops/x/x.h"\n#include <torch/library.h>\n// no data_ptr here\n',
    }
    bad = {
        "subbyte/base/c.h": '#include "subbyte/formats/b.h"\n',
        "subbyte/formats/c.h": '#include "subbyte/ops/x/x.h"\n',
        "subbyte/ops/x/c.cc": '#include "subbyte/io/r.h"\n',
        "subbyte/io/c.cc": '#include "subbyte/ops/x/x.h"\n',
        "subbyte/ops/x/d.cc": '#include "subbyte/cli/main.h"\n',
        "subbyte/ops/x/e.cc": "#include <torch/torch.h>\n",
        "subbyte/ops/x/f.cu": "#  include <ATen/cuda/CUDAContext.h>\n",
        "subbyte/base/g.cc": "#include <c10/util/Half.h>\n",
        "subbyte/cli/h.cc": "#include <Python.h>\n",
        "subbyte/ops/x/i.cc": '#include "../../io/r.h"\n',
        "subbyte/ops/x/j.cc": '#include "subbyte_torch/convert.h"\n',
        "subbyte/extras/k.h": "",
        "subbyte_torch/ops/l.cpp": "#include <Python.h>\n",
        "subbyte_torch/ops/m.cpp": "#include <pybind11/pybind11.h>\n",
        "subbyte_torch/ops/n.cpp": "auto* p = x.const_data_ptr<float>();\n",
    }
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, text in (good | bad).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        count, messages = check(root)
    found = {m.split(":")[0] for m in messages}
    wrong = sorted(found ^ set(bad))
    for name in wrong:
        print(f"check_layers --self-test: {name} was {'refused' if name in good else 'let through'}", file=sys.stderr)
    if count != len(good) + len(bad):
        print(f"check_layers --self-test: {count} files read, expected {len(good) + len(bad)}", file=sys.stderr)
        return 1
    return 1 if wrong else 0


def main(argv):
    if argv == ["--self-test"]:
        return self_test()
    root = pathlib.Path(argv[0] if argv else pathlib.Path(__file__).resolve().parent.parent)
    count, messages = check(root)
    for m in messages:
        print(m, file=sys.stderr)
    if count == 0:
        print(f"check_layers: no source under {root}/subbyte: nothing was checked", file=sys.stderr)
        return 1
    print(f"check_layers: {count} files, {len(messages)} violations")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
