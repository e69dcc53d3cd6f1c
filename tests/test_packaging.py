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
INTEGRATIONS = {path.parent.name for path in (ROOT / "integrations").glob("*/__init__.py")}


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


def packaged() -> dict[str, str]:
    """Where every file of the wheel lies in the checkout, by its name in the wheel."""
    library = [path for path in (ROOT / "cyclekd").iterdir() if path.is_file()]
    found = {f"cyclekd/{path.name}": path for path in library}
    found["cyclekd/integrations/__init__.py"] = ROOT / "cyclekd/integrations/__init__.py"
    for name in INTEGRATIONS:
        files = (ROOT / "integrations" / name).rglob("*.py")
        found |= {f"cyclekd/{path.relative_to(ROOT)}": path for path in files}
    return {name: path.relative_to(ROOT).as_posix() for name, path in found.items()}


def run_away_from_the_checkout(code, site, cwd):
    """Runs `code` with `site` first on the path, and without this checkout where an installation links to it."""
    without = f"import sys; sys.path = [path for path in sys.path if path != {str(ROOT)!r}]\n"
    return subprocess.run(
        [sys.executable, "-c", without + code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(dist, tmp_path_factory):
    """The wheel as installed; a pure one is installed by unpacking it."""
    (wheel,) = dist.glob("*.whl")
    folder = tmp_path_factory.mktemp("installed") / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_beside_it(dist):
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == packaged().keys()
    assert {"cyclekd/py.typed", "cyclekd/integrations/deit/train.py", "cyclekd/integrations/runs/seeds.py"} <= names


@pytest.mark.slow
def test_sdist_holds_what_builds_the_wheel(dist):
    (sdist,) = dist.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", *packaged().values()} <= names
    assert "integrations/runs/seeds.py" in names


def test_listed_packages_are_the_folders_there_are():
    listed = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = {f"cyclekd.integrations.{name}" for name in INTEGRATIONS}
    assert listed["package-dir"] == {name: name.removeprefix("cyclekd.").replace(".", "/") for name in names}
    with_code = {path.parent for path in (ROOT / "integrations").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in with_code)
    folders = {f"cyclekd.{'.'.join(folder.relative_to(ROOT).parts)}" for folder in with_code}
    assert set(listed["packages"]) == {"cyclekd", "cyclekd.integrations"} | folders


@pytest.mark.slow
def test_installed_wheel_runs_outside_the_checkout(site, tmp_path):
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
    done = run_away_from_the_checkout(code, site, tmp_path)
    assert done.stdout == "fine\n", done.stdout + done.stderr


@pytest.mark.slow
def test_integrations_of_the_installed_wheel_are_its_own(site, tmp_path):
    """A folder that looks like the checkout lies where it is run, and there is one around it."""
    for decoy in (tmp_path, site.parent):
        (decoy / "integrations/runs").mkdir(parents=True)
        (decoy / "integrations/runs/__init__.py").write_text("raise AssertionError('of the checkout')")
        (decoy / "pyproject.toml").touch()
    code = """
import cyclekd.integrations
from cyclekd.integrations.runs.seeds import derive_seed
assert 0 <= derive_seed("a", 1) < 2**63
print(*cyclekd.integrations.__path__, sep="\\n")
"""
    done = run_away_from_the_checkout(code, site, tmp_path)
    assert done.stdout.splitlines() == [str(site / "cyclekd/integrations")], done.stdout + done.stderr


def test_integrations_of_the_checkout_lie_beside_the_library():
    code = "import cyclekd.integrations.runs.seeds as seeds; print(seeds.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(ROOT / "integrations/runs/seeds.py"), done.stdout + done.stderr


def test_version_is_the_metadata_version():
    try:
        installed = version("cyclekd")
    except PackageNotFoundError:
        pytest.skip("cyclekd runs from the checkout and is not installed")
    assert installed == cyclekd.__version__
