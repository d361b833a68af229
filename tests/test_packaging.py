"""What is installed: every package, the adapters under their public name, types, metadata."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pyproject() -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        tomllib = pytest.importorskip("tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(folder: str) -> list[Path]:
    found = (ROOT / folder).rglob("*.py")
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


def installed_name(path: Path) -> Path:
    """Where a source file lies in an installation."""
    return Path("flashns_dist", path) if path.parts[0] == "integrations" else path


def test_every_package_is_listed() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    present = {
        ".".join(installed_name(path).parent.parts)
        for folder in ("flashns_dist", "integrations")
        for path in sources(folder)
    }
    assert sorted(listed) == sorted(present)


def test_every_folder_of_sources_is_a_package() -> None:
    """Without ``__init__.py`` a folder works from the checkout and is missing from the wheel."""
    for folder in ("flashns_dist", "integrations"):
        for path in sources(folder):
            assert (ROOT / path.parent / "__init__.py").is_file(), path


def test_adapters_are_installed_inside_the_package() -> None:
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapping == {"flashns_dist.integrations": "integrations"}
    assert not (ROOT / "flashns_dist" / "integrations").exists()


def test_an_adapter_does_not_shadow_its_framework() -> None:
    """Only ``flashns_dist.integrations`` may be imported: the bare folder would hide deepspeed."""
    banned = pyproject()["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert "integrations" in banned
    assert "--import-mode=importlib" in pyproject()["tool"]["pytest"]["ini_options"]["addopts"]


def test_torch_is_the_only_dependency() -> None:
    project = pyproject()["project"]
    assert [d.split(">")[0] for d in project["dependencies"]] == ["torch"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"triton", "quack", "deepspeed", "megatron", "train", "dev"}


def test_the_version_is_written_once_in_the_code() -> None:
    tree = ast.parse((ROOT / "flashns_dist" / "__init__.py").read_text())
    (version,) = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]
    assert version == pyproject()["project"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; built from a copy, without network and without isolation."""
    pytest.importorskip("setuptools", minversion="77")  # has its own bdist_wheel
    copy = tmp_path_factory.mktemp("source")
    for folder in ("flashns_dist", "integrations"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    unpacked = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(built).extractall(unpacked)
    return unpacked


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    """Sources, the type marker, and whatever data a package reads at run time."""
    expected = {
        installed_name(path.relative_to(ROOT))
        for folder in ("flashns_dist", "integrations")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert Path("flashns_dist/py.typed") in expected
    found = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    assert {path for path in found if not path.parts[0].endswith(".dist-info")} == expected


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    (info,) = wheel.glob("*.dist-info")
    metadata = PathDistribution(info).metadata
    assert metadata["Name"] == "flashns-dist"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert (info / "licenses" / "LICENSE").is_file()
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert required == ["torch>=2.8"]


def test_the_wheel_imports_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import flashns_dist, flashns_dist.integrations as adapters;"
        "print(flashns_dist.__file__); print(adapters.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(wheel)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package = wheel / "flashns_dist"
    expected = [package / "__init__.py", package / "integrations" / "__init__.py"]
    assert [Path(line) for line in done.stdout.split()] == expected
