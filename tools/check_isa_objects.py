#!/usr/bin/env python3
"""Proves that kernel objects leak no code into the rest of the program.

A file compiled for AVX-512 that emits an inline function or a template with external linkage leaves a weak copy that the linker may
keep for everyone: a program that then dies on older processors. So an object of a x86_<isa>*.cc file may define
  - no weak or unique symbol at all (nm: W V u w), and
  - only global symbols in namespace subbyte that say their instruction set: a namespace avx2, avx512, avx512_vnni, or a name that ends
    on it (..._avx2, ..._avx2_part), the same one as the file's.

  check_isa_objects.py BUILD_FOLDER   reads every x86_*.o below it; finding none is an error
  check_isa_objects.py --self-test    compiles objects that break each rule and one that breaks none
"""
import pathlib
import re
import subprocess
import sys
import tempfile

ISAS = ("avx512_vnni", "avx512", "avx2")  # longest first: the name of a file decides
WEAK = set("WVuw")


def isa_of_file(name):
    for isa in ISAS:
        if re.match(rf"x86_{isa}(?![0-9a-z])", name):
            return isa
    return None


def says_isa(symbol, isa):
    """Whether a demangled name lies in subbyte and names this instruction set, and no longer one."""
    name = symbol.split("(")[0]
    if not name.startswith("subbyte::"):
        return False
    words = re.findall(r"avx512_vnni|avx512|avx2", name)
    return bool(words) and all(w == isa for w in words)


def violations_of(path):
    done = subprocess.run(["nm", "--demangle", "--defined-only", path], capture_output=True, text=True)
    weak = subprocess.run(["nm", "--demangle", path], capture_output=True, text=True)
    if done.returncode or weak.returncode:
        return [f"nm failed: {done.stderr or weak.stderr}".strip()]
    isa = isa_of_file(path.name)
    if isa is None:
        return [f"the file name says no instruction set, expected x86_{{{','.join(reversed(ISAS))}}}*.cc"]
    out = []
    line = re.compile(r"^[0-9a-f ]*\s([A-Za-z]) (.*)$")
    for text in weak.stdout.splitlines():
        if (m := line.match(text)) is not None and m.group(1) in WEAK:
            out.append(f"weak symbol ({m.group(1)}): {m.group(2)}")
    for text in done.stdout.splitlines():
        if (m := line.match(text)) is not None and m.group(1).isupper() and m.group(1) not in WEAK and not says_isa(m.group(2), isa):
            out.append(f"global symbol without '{isa}' in its name: {m.group(2)}")
    return out


def check(folder):
    objects = sorted(p for p in pathlib.Path(folder).rglob("x86_*.o") if not p.name.endswith((".d.o",)))
    return len(objects), [f"{p.name} ({p.parent.name}): {v}" for p in objects for v in violations_of(p)]


def self_test():
    # name of the file -> (source, must it be refused)
    sources = {
        "x86_avx2.cc": ("namespace subbyte { namespace { int f() { return 1; } } namespace op::avx2 { int run() { return f(); } }"
                        " int op_rows_avx2_prepare() { return 2; } }", False),
        "x86_avx512_vnni_tile.cc": ("namespace subbyte::avx512_vnni { int run() { return 1; } }", False),
        "x86_avx2_inline.cc": ("inline int leak() { return 1; } namespace subbyte::avx2 { int (*run())() { return &leak; } }", True),
        "x86_avx2_template.cc": ("namespace subbyte { template <int N> [[gnu::noinline]] int leak() { return N; }"
                                 " namespace avx2 { int run() { return leak<3>(); } } }", True),
        "x86_avx2_static.cc": ("inline int& once() { static int n = 0; return n; } namespace subbyte::avx2 { int run() { return ++once(); } }", True),
        "x86_avx2_reference.cc": ("extern int other() __attribute__((weak)); namespace subbyte::avx2 { int run() { return other ? 1 : 0; } }", True),
        "x86_avx2_plain.cc": ("namespace subbyte { int run() { return 1; } }", True),
        "x86_avx2_data.cc": ("namespace subbyte { extern const int table[2]; const int table[2] = {1, 2}; }", True),
        "x86_avx512.cc": ("namespace subbyte::avx2 { int run() { return 1; } }", True),
        "x86_avx2_above.cc": ("namespace subbyte::avx512 { int run() { return 1; } }", True),
        "x86_avx2_foreign.cc": ("namespace other::avx2 { int run() { return 1; } }", True),
        "x86_sse9.cc": ("namespace subbyte { namespace { int unused() { return 1; } } }", True),
    }
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, bad) in sources.items():
            path = pathlib.Path(folder, name)
            path.write_text(source + "\n")
            obj = path.with_name(name + ".o")
            subprocess.run(["c++", "-std=c++20", "-O1", "-w", "-c", path, "-o", obj], check=True)
            if bool(violations_of(obj)) != bad:
                print(f"check_isa_objects --self-test: {name} was {'let through' if bad else 'refused'}: {violations_of(obj)}", file=sys.stderr)
                failed += 1
        if check(folder)[0] != len(sources):
            print("check_isa_objects --self-test: objects were overlooked", file=sys.stderr)
            failed += 1
    with tempfile.TemporaryDirectory() as empty:
        if main([empty]) == 0:
            print("check_isa_objects --self-test: a folder without objects passed", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def main(argv):
    if argv == ["--self-test"]:
        return self_test()
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    count, messages = check(argv[0])
    for m in messages:
        print(m, file=sys.stderr)
    if count == 0:
        print(f"check_isa_objects: no x86_*.o below {argv[0]}: nothing was checked", file=sys.stderr)
        return 1
    print(f"check_isa_objects: {count} objects, {len(messages)} violations")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
