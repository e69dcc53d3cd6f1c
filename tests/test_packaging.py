"""What the built distributions hold, and that the wheel works away from the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import cyclekd

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, ROOT], capture_output=True, text=True, check=False
    )
    if "No matching distribution found for setuptools" in built.stdout + built.stderr:
        pytest.skip("building needs setuptools from a package index, and none was reached")
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_beside_it(dist):
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"cyclekd/{path.name}" for path in (ROOT / "cyclekd").iterdir() if path.is_file()}
    assert "cyclekd/py.typed" in names


@pytest.mark.slow
def test_sdist_holds_what_builds_the_wheel(dist):
    (sdist,) = dist.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "cyclekd/wrap.py", "cyclekd/py.typed"} <= names


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_checkout(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(site)
    code = f"""
import cyclekd, torch
assert cyclekd.__file__.startswith({str(site)!r}), cyclekd.__file__
block = torch.nn.TransformerEncoderLayer(8, 2, 16)
model = torch.nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
assert len(cyclekd.wrap_multicycle(model, 2)(torch.randn(5, 2, 8)).outputs) == 2
try:
    import integrations
except ModuleNotFoundError:
    print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fine\n", done.stdout + done.stderr


def test_version_is_the_metadata_version():
    try:
        installed = version("cyclekd")
    except PackageNotFoundError:
        pytest.skip("cyclekd runs from the checkout and is not installed")
    assert installed == cyclekd.__version__
