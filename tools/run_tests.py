"""Runs every stage of `make test` and adds up what they counted.

    python tools/run_tests.py            all stages
    python tools/run_tests.py core cli   these only

Each stage prints one line: its verdict, its counts, its time. What its commands print goes to build/test-logs/<stage>.log, and the end of
what failed to the screen. The last line is '<N> passed, <M> failed, <K> skipped'; the exit status is 1 when M is not 0.

A stage is a function with @stage that returns a Count or calls Run.check (one command = one test), Run.gtest and Run.pytest (counted
from the XML they write). A build that fails, a program that crashes before writing its XML, a missing script: one failed test.
"""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "test-logs"
TORCH_VERSION = os.environ.get("TORCH_VERSION", "2.11.0")
JOBS = os.environ.get("JOBS") or str(os.cpu_count() or 2)
PYTHON = sys.executable  # of the virtual environment: the Makefile calls it so
TORCH_PRESET = os.environ.get("TORCH_PRESET", "torch")  # gpu where there is a GPU and a CUDA compiler
TORCH_BUILD = ROOT / "build" / f"{TORCH_PRESET}-{TORCH_VERSION}"
FUZZ_SECONDS = os.environ.get("FUZZ_SECONDS", "10")
STAGE_TIMEOUT_S = 2400
FAILED_LINES = 60  # how much of a failed command's output goes to the screen


@dataclass
class Count:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other):
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


class StageFailure(Exception):
    pass


class Run:
    """Runs the commands of one stage, logs them, counts their tests."""

    def __init__(self, name):
        LOGS.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log_path = LOGS / f"{name}.log"
        self.log = open(self.log_path, "w", buffering=1)
        self.reasons = []  # why tests were skipped, for the verdict line
        self.failed_output = []  # the end of what each failed command printed

    def command(self, *argv, env=None, cwd=ROOT):
        """Exit status of a command, its output in the log."""
        argv = [str(a) for a in argv]
        self.log.write(f"\n$ {' '.join(argv)}\n")
        began = self.log_path.stat().st_size
        try:
            done = subprocess.run(
                argv,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                timeout=STAGE_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            self.log.write(f"{error}\n")
            return 127
        if done.returncode:
            with open(self.log_path, errors="replace") as log:
                log.seek(began)
                self.failed_output += [f"$ {' '.join(argv)[:120]}", *log.read().splitlines()[-FAILED_LINES:]]
        return done.returncode

    def must(self, *argv, **kwargs):
        """A step without which the rest of the stage makes no sense."""
        if self.command(*argv, **kwargs):
            raise StageFailure(" ".join(str(a) for a in argv)[:90])

    def check(self, *argv, **kwargs):
        """One command is one test."""
        return Count(failed=1) if self.command(*argv, **kwargs) else Count(passed=1)

    def build(self, preset, *targets, build_dir=None, options=()):
        build_dir = build_dir or ROOT / "build" / preset
        self.must("cmake", "--preset", preset, "-B", build_dir, *options)
        self.must("cmake", "--build", build_dir, "-j", JOBS, *(("--target", *targets) if targets else ()))
        return build_dir

    def counted(self, xml_path, argv, **kwargs):
        xml_path.unlink(missing_ok=True)
        status = self.command(*argv, **kwargs)
        try:
            cases = list(xml.etree.ElementTree.parse(xml_path).iter("testcase"))
        except (OSError, xml.etree.ElementTree.ParseError):
            raise StageFailure(f"{Path(argv[0]).name} ended with status {status} and wrote no results") from None
        count = Count()
        for case in cases:
            if case.find("failure") is not None or case.find("error") is not None:
                count.failed += 1
            elif case.find("skipped") is not None or case.get("result") == "skipped":
                count.skipped += 1
                if (skip := case.find("skipped")) is not None and skip.get("message"):
                    self.reasons.append(skip.get("message").strip().splitlines()[-1])
            elif case.get("status", "run") == "run":  # gtest lists disabled tests as "notrun"
                count.passed += 1
        if status and not count.failed:  # a crash after the last test, a leak report of a sanitizer
            count.failed += 1
        if not count.passed + count.failed + count.skipped:
            raise StageFailure(f"{Path(argv[0]).name} ran no test")
        return count

    def gtest(self, program, *args, **kwargs):
        xml_path = LOGS / f"{self.name}-{Path(program).name}.xml"
        return self.counted(xml_path, [program, "--gtest_brief=1", f"--gtest_output=xml:{xml_path}", *args], **kwargs)

    def pytest(self, *args, env=None):
        xml_path = LOGS / f"{self.name}-pytest.xml"
        argv = [PYTHON, "-m", "pytest", "-q", "-rs", "--durations=10", f"--junitxml={xml_path}", *args]
        paths = {
            "PYTHONPATH": str(ROOT / "python"),
            "SUBBYTE_TORCH_LIB": str(TORCH_BUILD / "subbyte_torch" / "libsubbyte_torch.so"),
            "SUBBYTE_PROGRAM": str(ROOT / "build" / "core" / "subbyte" / "cli" / "subbyte"),
        }
        return self.counted(xml_path, argv, env={**paths, **(env or {})})


STAGES = {}


def stage(function):
    STAGES[function.__name__.replace("_", "-")] = function
    return function


# --- the stages, cheap ones first ----------------------------------------------------------------------------------------------------


@stage
def format(run):
    """clang-format leaves every source as it is."""
    return run.check("tools/check_format.sh") + run.check("tools/check_format.sh", "--self-test")


@stage
def layers(run):
    """No part includes what stands above it."""
    return run.check(PYTHON, "tools/check_layers.py") + run.check(PYTHON, "tools/check_layers.py", "--self-test")


@stage
def golden(run):
    """The golden vectors are what their independent generator makes."""
    return run.check(PYTHON, "tools/make_golden.py", "--check")


@stage
def core(run):
    """Core: build, tests."""
    return run.gtest(run.build("core") / "subbyte" / "core_tests")


@stage
def isa_objects(run):
    """Kernels of one instruction set leak no code into the rest of the program."""
    return run.check(PYTHON, "tools/check_isa_objects.py", run.build("core", "subbyte_core")) + run.check(
        PYTHON, "tools/check_isa_objects.py", "--self-test"
    )


@stage
def cli(run):
    """The subbyte program."""
    run.build("core", "subbyte", "run_checkpoint")
    return run.pytest("tests/cli", "tests/io")


@stage
def core_asan(run):
    """Core tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return run.gtest(run.build("core-asan", "core_tests") / "subbyte" / "core_tests")


@stage
def fuzz(run):
    """Every fuzz target: its kept corpus, then some seconds of new inputs."""
    build_dir = run.build("fuzz")
    count = Count()
    targets = sorted(p for p in (build_dir / "subbyte").iterdir() if p.name.endswith("_fuzz") and p.is_file())
    if not targets:
        raise StageFailure("no fuzz target was built")
    for target in targets:
        corpus = ROOT / "testdata" / "fuzz" / target.name.removesuffix("_fuzz")
        kept = sorted(corpus.iterdir()) if corpus.is_dir() else []
        if not kept:
            raise StageFailure(f"{corpus.relative_to(ROOT)} holds no corpus")
        count += run.check(target, "-runs=0", corpus)
        found = build_dir / "found" / target.name
        found.mkdir(parents=True, exist_ok=True)
        count += run.check(
            target,
            f"-max_total_time={FUZZ_SECONDS}",
            "-rss_limit_mb=2048",
            "-timeout=10",
            f"-artifact_prefix={found}/",
            found,
            corpus,
        )
    return count


def build_torch(run):
    return run.build(TORCH_PRESET, build_dir=TORCH_BUILD, options=[f"-DPython_EXECUTABLE={PYTHON}"])


@stage
def torch(run):
    """LibTorch layer: build, tests in C++."""
    return run.gtest(build_torch(run) / "subbyte_torch" / "torch_tests")


@stage
def examples(run):
    """The example programs: they build, and run on a slice of their data."""
    run.build("core", "subbyte", "run_checkpoint")
    build_torch(run)
    return run.pytest("tests/examples")


@stage
def python(run):
    """Operators and the Python package."""
    build_torch(run)
    return run.pytest("tests/torch", "tests/python", "tests/compat")


@stage
def package(run):
    """What cmake --install exports: separate projects find it, with the core alone and with LibTorch."""
    core_build = run.build("core", "subbyte_core", "subbyte")
    torch_build = build_torch(run)
    torch_dir = (
        Path(next(iter(sorted((Path(sys.prefix) / "lib").glob("python*/site-packages/torch"))))) / "share" / "cmake" / "Torch"
    )
    return run.check("tests/package/run", core_build, "core") + run.check(
        "tests/package/run", torch_build, "torch", env={"Torch_DIR": str(torch_dir)}
    )


@stage
def wheel(run):
    """pip builds a wheel; it imports in an environment without a compiler and refuses another PyTorch."""
    return run.pytest("tests/package/test_wheel.py")


@stage
def cuda(run):
    """The CUDA kernels compile; where there is a device, their tests pass."""
    nvcc = next((p for p in cuda_compilers() if os.access(p, os.X_OK)), None)
    if nvcc is None:
        run.reasons.append("no nvcc, and PyPI gave none")
        return Count(skipped=1)
    options = [f"-DSB_NVCC={nvcc}", f"-DCUDAToolkit_ROOT={nvcc.parent.parent}"]
    build_dir = run.build("cuda", "subbyte_cuda", "cuda_tests", options=options)
    program = build_dir / "subbyte" / "cuda_tests"
    if has_cuda_device():
        return run.gtest(program)
    listed = subprocess.run([program, "--gtest_list_tests"], check=True, capture_output=True, text=True).stdout.splitlines()
    tests = sum(line.startswith("  ") for line in listed)
    run.reasons += ["no CUDA device: compiled, not run"] * tests
    return Count(passed=1, skipped=tests)


def has_cuda_device():
    done = subprocess.run([PYTHON, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True)
    return done.stdout.strip().endswith("True")


def cuda_compilers():
    for folder in os.environ["PATH"].split(os.pathsep):
        yield Path(folder) / "nvcc"
    yield Path("/usr/local/cuda/bin/nvcc")
    yield ROOT / ".venv" / f"torch-{TORCH_VERSION}" / "cuda" / "nvidia" / "cu13" / "bin" / "nvcc"


@stage
def demo(run):
    """The demo, shortened: one window of text, fewer settings."""
    build_torch(run)
    run.build("core", "subbyte", "run_checkpoint")
    return run.pytest("tests/demo")


# -------------------------------------------------------------------------------------------------------------------------------------


def main(names):
    unknown = [n for n in names if n not in STAGES]
    if unknown:
        sys.exit(f"no stage {', '.join(unknown)}; there are: {', '.join(STAGES)}")
    names = names or list(STAGES)
    width = max(map(len, names))
    print(f"PyTorch {TORCH_VERSION}, {JOBS} jobs, logs in build/test-logs/", flush=True)
    total, began = Count(), time.monotonic()
    for name in names:
        print(f"{name:{width}}  ", end="", flush=True)
        run, start, problem = Run(name), time.monotonic(), ""
        try:
            count = STAGES[name](run)
        except StageFailure as failure:
            count, problem = Count(failed=1), str(failure)
        run.log.close()
        total += count
        verdict = "FAILED" if count.failed else "ok" if count.passed else "skipped"
        print(f"{verdict:7}  {count}  ({time.monotonic() - start:.0f} s)", flush=True)
        for reason in sorted(set(run.reasons)):
            print(f"{'':{width}}    skipped, {run.reasons.count(reason)} times: {reason}")
        if count.failed:
            if problem:
                print(f"    {problem}")
            print("    | " + "\n    | ".join(run.failed_output), flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    print(total, flush=True)
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
