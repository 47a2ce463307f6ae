"""subbyte.compat.install: import paths."""

import importlib
import subprocess
import sys
import types

import pytest
import torch

import subbyte.compat
from subbyte.compat.paths import BITORCH_ENGINE_PATHS


@pytest.mark.parametrize("path", sorted(BITORCH_ENGINE_PATHS))
def test_every_path_imports_and_has_its_names(path):
    module = __import__(path, fromlist=["_"])
    for name in BITORCH_ENGINE_PATHS[path]:
        assert hasattr(module, name)
    scope = {}
    exec(f"import {path} as imported", scope)
    assert scope["imported"] is module


@pytest.mark.parametrize(
    "path, name",
    [
        ("layers.qconv.binary.cpp.layer", "BinaryConv2dCPP"),
        ("layers.qconv.binary.cutlass.layer", "BinaryConv2dCutlass"),
        ("layers.qconv.nbit.cutlass.layer", "Q4Conv2dCutlass"),
        ("layers.qlinear.layer", "QLinearInf"),
        ("layers.qlinear.binary.cpp.layer", "BinaryLinearCPP"),
        ("layers.qlinear.binary.cuda.layer", "BinaryLinearCuda"),
        ("layers.qlinear.binary.cuda.bmm", "BMM"),
        ("layers.qlinear.nbit.mps.mpq_layer", "MPQLinearMlx"),
        ("utils.quant_operators", "gptq_stype_unpacking"),
    ],
)
def test_the_files_of_the_layers_are_paths_too(path, name):
    module = importlib.import_module(f"bitorch_engine.{path}")
    package = importlib.import_module(f"bitorch_engine.{path.rpartition('.')[0]}")
    assert getattr(package, name, getattr(module, name)) is getattr(module, name)


def test_one_name_is_one_object_under_all_its_paths():
    seen = {}
    for path, names in BITORCH_ENGINE_PATHS.items():
        for name in names:
            seen.setdefault(name, set()).add(id(getattr(sys.modules[path], name)))
    assert all(len(ids) == 1 for ids in seen.values())


def test_install_again_changes_nothing_and_uninstall_takes_all_back():
    import bitorch_engine

    subbyte.compat.install()
    assert sys.modules["bitorch_engine"] is bitorch_engine
    subbyte.compat.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "bitorch_engine"]
    with pytest.raises(ModuleNotFoundError):
        import bitorch_engine  # noqa: F811


def test_an_unknown_path_is_an_ordinary_import_error():
    with pytest.raises(ModuleNotFoundError, match="bitorch_engine.layers.nothing"):
        import bitorch_engine.layers.nothing  # noqa: F401


def test_install_refuses_when_the_real_package_is_imported(monkeypatch):
    subbyte.compat.uninstall()
    real = types.ModuleType("bitorch_engine")
    real.__file__ = "/somewhere/bitorch_engine/__init__.py"
    monkeypatch.setitem(sys.modules, "bitorch_engine", real)
    with pytest.raises(ImportError, match="/somewhere/bitorch_engine"):
        subbyte.compat.install()
    assert sys.modules["bitorch_engine"] is real


def test_uninstall_leaves_a_foreign_module_alone():
    foreign = types.ModuleType("bitorch_engine")
    sys.modules["bitorch_engine"] = foreign
    try:
        subbyte.compat.uninstall()
        assert sys.modules["bitorch_engine"] is foreign
    finally:
        del sys.modules["bitorch_engine"]


def test_names_of_the_package_itself():
    import bitorch_engine

    bitorch_engine.initialize()
    assert bitorch_engine.torch_int_gradients_support is True
    from bitorch_engine.extensions import EXTENSION_PREFIX

    assert EXTENSION_PREFIX == "bitorch_engine.extensions."


def test_import_extension_warns_and_raises_when_used():
    from bitorch_engine.utils.safe_import import import_extension

    with pytest.warns(UserWarning, match="q_linear_cuda"):
        extension = import_extension("q_linear_cuda")
    with pytest.raises(RuntimeError, match="q_linear_cuda.forward"):
        extension.forward
    with pytest.warns(UserWarning):
        missing = import_extension("x", not_yet_implemented=True)
    with pytest.raises(RuntimeError, match="never implemented"):
        missing.anything()


def test_importing_subbyte_alone_installs_nothing():
    code = "import subbyte, subbyte.compat, sys; sys.exit('bitorch_engine' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_integer_parameters_have_the_old_face():
    import copy
    import pickle

    from subbyte.compat.integer_parameter import IntegerParameter, gradient_handle

    module = torch.nn.Module()
    module.qweight = IntegerParameter(torch.arange(6, dtype=torch.int32).reshape(2, 3))
    assert module.qweight.dtype == torch.int32 and module.qweight.requires_grad and module.qweight.grad is None
    assert list(module.state_dict()) == ["qweight"] and [p.requires_grad for p in module.parameters()] == [True]
    module.qweight.data = torch.ones(2, 3, dtype=torch.int32)
    handle = gradient_handle((2, 3), torch.float32, "cpu", module.qweight.accumulate_grad)
    for _ in range(2):
        (handle * torch.arange(3.0)).sum().backward()
    assert torch.equal(module.qweight.grad, 2 * torch.arange(3.0).expand(2, 3)) and handle.grad is None
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied.qweight) is IntegerParameter and copied.qweight.requires_grad
        assert torch.equal(copied.qweight, module.qweight) and copied.qweight.data_ptr() != module.qweight.data_ptr()
    module.requires_grad_(False)
    assert not module.qweight.requires_grad
    module.zero_grad()
    assert module.qweight.grad is None
    module.load_state_dict({"qweight": torch.full((2, 3), 7, dtype=torch.int32)})
    assert module.qweight.tolist() == [[7] * 3] * 2
    with pytest.raises(ValueError, match="grad is"):
        module.qweight.grad = torch.ones(3)
