"""Who imports whom, where collectives are, and what an import of the package touches."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flashns_dist"
INTEGRATIONS = ROOT / "integrations"

# Folder -> the folders of the package that it may import (docs/architecture.md).
MAY_IMPORT = {
    "orthogonalize": set(),
    "layout": set(),
    "plan": {"layout"},
    "exchange": {"layout", "plan"},
    "optim": {"orthogonalize", "layout", "plan", "exchange"},
    "testing": set(),
    "": {"optim", "orthogonalize"},  # flashns_dist/__init__.py
    "integrations": {"optim", "layout", ""},
}
KERNEL_LIBRARIES = {"triton", "quack", "cutlass"}
FRAMEWORKS = {"deepspeed", "megatron", "transformer_engine"}
# On torch.distributed; the ones that carry tensors, and those that setup code may use.
TENSOR_COLLECTIVES = {
    "all_reduce", "all_reduce_coalesced", "all_gather", "all_gather_coalesced",
    "all_gather_into_tensor", "all_gather_single", "all_to_all", "all_to_all_single", "broadcast",
    "reduce", "reduce_scatter", "reduce_scatter_tensor", "gather", "scatter", "send", "recv",
    "isend", "irecv", "batch_isend_irecv",
}  # fmt: skip
SETUP_COLLECTIVES = {
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list",
    "barrier", "monitored_barrier",
}  # fmt: skip
# Methods of DTensor that hide collectives.
HIDDEN_COLLECTIVES = {"full_tensor", "redistribute", "distribute_tensor"}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "integrations":
        parts.insert(0, "flashns_dist")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, name: str, is_package: bool = False) -> list[str]:
    """Dotted names of everything that a module imports, at any depth of its code.

    ``from a import b`` counts as ``a.b``: b may be a module.
    """
    found = []
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


def imports_of(path: Path) -> list[str]:
    return imported(path.read_text(), module_name(path), path.name == "__init__.py")


def folder_of(module: str) -> str:
    """The folder of flashns_dist that a dotted name lies in; "" for the package itself."""
    parts = module.split(".")
    known = len(parts) > 1 and (parts[1] in MAY_IMPORT or (PACKAGE / parts[1]).is_dir())
    return parts[1] if known else ""


def collectives(source: str) -> list[str]:
    """Collectives of torch.distributed that a source refers to, under whatever name."""
    tree = ast.parse(source)
    modules, found = {"torch.distributed"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch.distributed") and alias.asname:
                    modules.add(alias.asname)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.module == "torch" and alias.name == "distributed":
                    modules.add(alias.asname or alias.name)
                elif (node.module or "").startswith("torch.distributed"):
                    modules.add(alias.asname or alias.name)
                    found.append(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            hidden = node.attr in HIDDEN_COLLECTIVES
            if hidden or owner in modules or owner.startswith("torch.distributed."):
                found.append(node.attr)
    every = TENSOR_COLLECTIVES | SETUP_COLLECTIVES | HIDDEN_COLLECTIVES
    return [name for name in found if name in every]


def of_package() -> Iterator[tuple[Path, str]]:
    """Every file of the package and of the adapters, with its folder's name."""
    for path in files(PACKAGE):
        inside = path.relative_to(PACKAGE)
        yield path, inside.parts[0] if len(inside.parts) > 1 else ""
    for path in files(INTEGRATIONS):
        yield path, "integrations"


def test_every_folder_has_a_rule() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT) - {"", "integrations"}


def test_folders_import_only_what_they_may() -> None:
    wrong = []
    for path, folder in of_package():
        for module in imports_of(path):
            if module.split(".")[0] == "flashns_dist":
                target = folder_of(module)
                if target != folder and target not in MAY_IMPORT[folder]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_the_rules_are_used() -> None:
    """Guards the checker: the imports that the design is made of are seen."""
    seen = {
        (folder, folder_of(module))
        for path, folder in of_package()
        for module in imports_of(path)
        if module.startswith("flashns_dist.") and folder_of(module) != folder
    }
    expected = {("plan", "layout"), ("exchange", "plan"), ("exchange", "layout"), ("", "optim")}
    expected |= {("optim", name) for name in MAY_IMPORT["optim"]}
    assert expected <= seen


def test_nothing_imports_adapters_by_their_folder_or_the_launcher() -> None:
    everything = [*files(PACKAGE), *files(INTEGRATIONS), *files(ROOT / "launch")]
    for path in everything:
        for module in imports_of(path):
            assert module.split(".")[0] != "integrations", path
            inside_launch = (ROOT / "launch") in path.parents
            assert inside_launch or module.split(".")[0] != "launch", path


def test_kernel_libraries_are_imported_only_by_kernels() -> None:
    kernels = {PACKAGE / "orthogonalize" / "kernels", PACKAGE / "optim" / "fused"}
    for path, _ in of_package():
        libraries = {module.split(".")[0] for module in imports_of(path)} & KERNEL_LIBRARIES
        assert not libraries or kernels & {*path.parents}, f"{path} imports {libraries}"


def test_frameworks_are_imported_only_by_their_adapter() -> None:
    for path, _ in of_package():
        for module in imports_of(path):
            framework = module.split(".")[0]
            if framework in FRAMEWORKS:
                adapter = "megatron" if framework == "transformer_engine" else framework
                home = INTEGRATIONS / adapter
                assert home in path.parents or path == home.with_suffix(".py"), f"{path}: {module}"


def test_collectives_are_called_only_in_exchange() -> None:
    wrong = []
    for path, folder in of_package():
        for name in collectives(path.read_text()):
            allowed = folder == "exchange" or (
                folder == "integrations" and name in SETUP_COLLECTIVES
            )
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)} calls {name}")
    assert not wrong


def test_collectives_of_the_exchange_are_seen() -> None:
    """Guards the checker."""
    found = {name for path in files(PACKAGE / "exchange") for name in collectives(path.read_text())}
    assert {"all_to_all_single", "all_reduce", "all_gather", "all_gather_object"} <= found


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndef f(x):\n    dist.all_reduce(x)",
        "import torch\ntorch.distributed.broadcast(x, 0)",
        "from torch import distributed as d\nd.reduce_scatter_tensor(a, b)",
        "from torch.distributed import all_gather\nall_gather(a, b)",
        "from torch.distributed import distributed_c10d as c\nc.all_to_all(a, b)",
        "from torch.distributed import _functional_collectives as funcol\nfuncol.all_reduce(x)",
        "import torch.distributed.nn\ntorch.distributed.nn.all_reduce(x)",
        "y = x.full_tensor()",
        "y = x.redistribute(placements=p)",
    ],
)
def test_the_checker_sees_a_collective_in_any_spelling(source: str) -> None:
    assert collectives(source)


def test_the_checker_takes_other_functions_for_what_they_are() -> None:
    source = (
        "import torch, functools\nimport torch.distributed as dist\n"
        "torch.gather(x, 0, i); x.scatter(0, i, y); functools.reduce(f, xs); dist.get_rank()"
    )
    assert not collectives(source)


def test_the_checker_sees_imports_in_functions_and_relative_ones() -> None:
    source = (
        "def f():\n    import triton.language as tl\n"
        "from . import exchange\nfrom ..plan import Plan"
    )
    assert set(imported(source, "flashns_dist.layout.matrix")) == {
        "flashns_dist.layout.exchange",
        "flashns_dist.plan.Plan",
        "triton.language",
    }


PROBE = """
import importlib.util, json, os, sys
import torch, torch.distributed, torch.optim
sys.path.insert(0, sys.argv[1])
reads = []
original = os._Environ.__getitem__
def recorded(self, key):
    frame = sys._getframe(1)
    while frame and os.path.basename(frame.f_code.co_filename) in ("os.py", "_collections_abc.py",
                                                                   "<frozen os>",
                                                                   "<frozen _collections_abc>"):
        frame = frame.f_back
    reads.append((frame.f_code.co_filename, key))
    return original(self, key)
os._Environ.__getitem__ = recorded
os.environ.get("PROBE")
import flashns_dist
if importlib.util.find_spec("flashns_dist.integrations"):  # installed, not only in this folder
    import flashns_dist.integrations
os._Environ.__getitem__ = original
print(json.dumps({
    "file": flashns_dist.__file__,
    "taken": getattr(sys, "taken", []),
    "cuda": torch.cuda.is_initialized(),
    "group": torch.distributed.is_initialized(),
    "reads": reads,
}))
"""


def test_importing_the_package_touches_nothing(tmp_path: Path) -> None:
    """No kernel library or framework (stubs record an attempt), no CUDA, no environment read."""
    stubs = sorted(KERNEL_LIBRARIES | FRAMEWORKS)
    for name in stubs:
        (tmp_path / f"{name}.py").write_text(
            "import sys\nsys.taken = [*getattr(sys, 'taken', []), __name__]\nraise ImportError"
        )
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).parent == PACKAGE
    assert found["taken"] == []
    assert not found["cuda"]
    assert not found["group"]
    reads = found["reads"]
    assert ["<string>", "PROBE"] in reads, "the probe does not see reads"
    ours = [read for read in reads if "flashns_dist" in read[0] or "integrations" in read[0]]
    assert ours == []
