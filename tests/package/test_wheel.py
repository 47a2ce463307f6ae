"""`pip install .`: the wheel is built against the installed PyTorch, imports without a compiler, refuses one that differs."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MINOR = ".".join(torch.__version__.split(".")[:2])


def run(*argv, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SUBBYTE_", "PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run([str(a) for a in argv], env={**kept, **environment}, capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        ROOT,
        SUBBYTE_CUDA="OFF",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(out.glob("subbyte-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Python of a fresh environment with the wheel, which reaches torch of this one by a .pth file."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    done = run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-index",
        wheel,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (site / "torch_elsewhere.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python, site


def test_the_wheel_holds_the_package_and_the_library_and_asks_for_its_pytorch(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        recorded = archive.read("subbyte/libsubbyte_torch.so.torch_version").decode().strip()
    assert {"subbyte/__init__.py", "subbyte/packed_weight.py", "subbyte/libsubbyte_torch.so"} <= set(names)
    assert not [n for n in names if n.endswith((".h", ".a", ".cmake"))]
    assert recorded == torch.__version__.split("+")[0]
    for needed in (
        f"Requires-Dist: torch=={MINOR}.*",
        "Requires-Dist: numpy",
        "Requires-Dist: tqdm",
        "Requires-Dist: safetensors",
    ):
        assert needed in metadata, metadata
    assert wheel.name.startswith("subbyte-0.1.0-py3-none-")


def test_it_imports_and_works_on_a_machine_without_a_compiler(installed, tmp_path):
    python, _ = installed
    done = run(python, "-m", "subbyte", PATH=str(tmp_path), CC="/nonexistent", CXX="/nonexistent")
    assert done.returncode == 0 and "results are right" in done.stdout, done.stdout + done.stderr
    done = run(
        python,
        "-c",
        "import subbyte, torch; m = torch.nn.Linear(64, 8); subbyte.quantize_(torch.nn.Sequential(m), bits=4); "
        "print(m.weight, subbyte.info()['path'])",
        PATH=str(tmp_path),
    )
    assert "PackedWeight([8, 64]" in done.stdout and "environment" in done.stdout, done.stderr


def test_another_pytorch_is_refused_with_both_versions_and_what_to_do(installed):
    python, _ = installed
    pretend = "import torch; torch.__version__ = '1.99.0'; import subbyte"
    done = run(python, "-c", pretend)
    assert done.returncode != 0
    for word in ("LibraryError", torch.__version__.split("+")[0], "1.99.0", "pip install --force-reinstall"):
        assert word in done.stderr, done.stderr


def test_a_library_that_does_not_load_is_named_with_its_recorded_version(installed, tmp_path):
    python, _ = installed
    broken = tmp_path / "libsubbyte_torch.so"
    broken.write_bytes(b"not a library")
    (tmp_path / "libsubbyte_torch.so.torch_version").write_text("2.7.1\n")
    done = run(python, "-c", "import subbyte", SUBBYTE_TORCH_LIB=str(broken))
    for word in ("LibraryError", "was built with PyTorch 2.7.1", torch.__version__, "install PyTorch 2.7"):
        assert word in done.stderr, done.stderr
    done = run(python, "-c", "import subbyte", SUBBYTE_TORCH_LIB="/nonexistent.so")
    assert "SUBBYTE_TORCH_LIB names /nonexistent.so, which is not a file" in done.stderr


def test_the_backend_asks_for_pytorch_only_where_none_is_installed(monkeypatch):
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        import subbyte_build
        import subbyte_torch_location as location

        assert not [r for r in subbyte_build.get_requires_for_build_wheel({}) if r.startswith("torch")]
        assert location.installed_torch() == Path(torch.__file__).parent
        monkeypatch.setattr(subbyte_build, "installed_torch", lambda: None)
        assert location.DEFAULT_TORCH in subbyte_build.get_requires_for_build_wheel({})
        with pytest.raises(SystemExit, match="neither ON nor OFF"):
            monkeypatch.setattr(subbyte_build, "installed_torch", location.installed_torch)
            subbyte_build._with_cmake_settings({"cuda": "perhaps"})
    finally:
        sys.path.remove(str(ROOT / "packaging"))
