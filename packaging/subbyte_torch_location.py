"""Which PyTorch a build is for."""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

DEFAULT_TORCH = "torch==2.11.*"


@functools.cache
def installed_torch():
    """Folder of the torch package of the target environment, or of this one; None when neither has one."""
    if os.environ.get("SUBBYTE_TORCH"):
        return Path(os.environ["SUBBYTE_TORCH"])
    # -E: without PYTHONPATH and the like, by which pip hides the environment's own packages.
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    found = subprocess.run([sys.executable, "-E", "-c", find], capture_output=True, text=True).stdout.strip()
    if not found:
        spec = importlib.util.find_spec("torch")
        found = spec.origin if spec and spec.origin else ""
    return Path(found).parent if found else None


def torch_version(folder):
    """ "2.11.0" of a torch package, without its local part."""
    match = re.search(r"^__version__ = '(\d+\.\d+\.\d+)", (folder / "version.py").read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"subbyte: {folder / 'version.py'} names no version")
    return match[1]
