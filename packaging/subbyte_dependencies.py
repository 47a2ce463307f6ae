"""Metadata provider: a wheel runs with the minor version of PyTorch that it was built against, and says so."""

from subbyte_torch_location import DEFAULT_TORCH, installed_torch, torch_version


def dynamic_metadata(field, settings, project=None):
    if field != "dependencies":
        raise ValueError(f"subbyte_dependencies gives dependencies, not {field}")
    folder = installed_torch()
    torch = DEFAULT_TORCH if folder is None else f"torch=={'.'.join(torch_version(folder).split('.')[:2])}.*"
    return [torch, "numpy", "tqdm>=4.62", "safetensors>=0.4"]


def dynamic_wheel(field, settings):
    return True  # a source distribution does not know it
