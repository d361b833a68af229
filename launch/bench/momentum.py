"""How accurate each method is on the momentum of a real training run.

    python -m launch.bench.momentum --run runs/NAME --out momentum

Reads the momentum matrices of a run of launch/train.py from its last checkpoint, orthogonalizes
them by every method, and compares with the float64 polar factor. Writes ``momentum.jsonl`` (a line
per method and matrix) and ``momentum.png`` (singular values in and out), and prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from flashns_dist.orthogonalize import METHODS, orthogonalize
from flashns_dist.testing.spectra import (
    largest_singular_value,
    orthogonality_error,
    polar_factor,
)
from launch.bench.timing import Record
from launch.checkpoint import find_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def momentum_matrices(run: Path, limit: int) -> list[tuple[str, Tensor]]:
    """Up to ``limit`` momentum matrices of a run's last checkpoint, evenly chosen, by name."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(str(find_checkpoint(run)), f"{folder}/state.pt")
        state = torch.load(f"{folder}/state.pt", weights_only=False, map_location="cpu")
    found = sorted(_momenta(state, ""), key=lambda item: item[0])
    step = max(1, -(-len(found) // limit))
    return found[::step]


def _momenta(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _momenta(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor) and value.ndim == 2 and name.endswith("momentum_buffer"):
        short = name.removesuffix(".momentum_buffer").removeprefix("optimizer.state.")
        yield short, value


def measure(
    record: Record, matrices: list[tuple[str, Tensor]], dtype: torch.dtype
) -> dict[str, list[tuple[float, float, float]]]:
    """(error, largest singular value, error over that of gram) by method, one per matrix."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in METHODS}
    for name, matrix in matrices:
        wide = matrix.double().to(DEVICE)
        exact = polar_factor(wide)
        stable_rank = float(wide.norm() / torch.linalg.matrix_norm(wide, 2)) ** 2
        results = {
            method: orthogonalize(matrix.to(DEVICE), method=method, dtype=dtype)
            for method in METHODS
        }
        base = orthogonality_error(results["gram"].double(), exact)
        for method, result in results.items():
            error = orthogonality_error(result.double(), exact)
            largest = largest_singular_value(result.double())
            rows[method].append((error, largest, error / base))
            record.write(
                "momentum",
                matrix=name,
                shape=list(matrix.shape),
                method=method,
                dtype=str(dtype),
                stable_rank=round(stable_rank, 2),
                error=error,
                largest_singular_value=largest,
                over_gram=error / base,
            )
    return rows


def table(rows: dict[str, list[tuple[float, float, float]]]) -> str:
    """Median and worst over the matrices."""
    lines = ["method     EF median  EF worst  sigma_max worst  EF / gram median  worst"]
    for method, values in rows.items():
        errors, largest, ratios = (list(column) for column in zip(*values, strict=True))
        lines.append(
            f"{method:9s}  {statistics.median(errors):9.3f}  {max(errors):8.3f}  "
            f"{max(largest):15.3f}  {statistics.median(ratios):16.3f}  {max(ratios):5.3f}"
        )
    return "\n".join(lines)


def plot(matrices: list[tuple[str, Tensor]], dtype: torch.dtype, path: Path) -> None:
    """Singular values in, and those along the same directions out, for three matrices."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no picture")
        return
    chosen = [matrices[0], matrices[len(matrices) // 2], matrices[-1]]
    figure, axes = plt.subplots(1, len(chosen), figsize=(5 * len(chosen), 4), sharey=True)
    for axis, (name, matrix) in zip(axes, chosen, strict=True):
        left, values, right = torch.linalg.svd(matrix.double().to(DEVICE), full_matrices=False)
        axis.plot((values / values[0]).cpu().numpy(), "k--", label="in")
        for method in METHODS:
            result = orthogonalize(matrix.to(DEVICE), method=method, dtype=dtype).double()
            along = (left.mT @ result @ right.mT).diagonal()
            axis.plot(along.cpu().numpy(), label=method, lw=1)
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 2)
        axis.set_title(f"{name} {tuple(matrix.shape)}", fontsize=8)
        axis.set_xlabel("singular direction")
    axes[0].set_ylabel("singular value")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    """Measures one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of train.py")
    parser.add_argument("--out", type=Path, default=Path("momentum"), help="path without suffix")
    parser.add_argument("--limit", type=int, default=40, help="matrices at most")
    parser.add_argument("--dtype", default="float16", help="of the iteration")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    matrices = momentum_matrices(options.run, options.limit)
    if not matrices:
        raise SystemExit(
            f"{options.run}: its checkpoint has no momentum; use --optimizer flashmuon"
        )
    rows = measure(Record(options.out.with_suffix(".jsonl")), matrices, dtype)
    print(f"{len(matrices)} matrices of {options.run}, iteration in {options.dtype} on {DEVICE}")
    print(table(rows))
    plot(matrices, dtype, options.out.with_suffix(".png"))


__all__ = ["main", "measure", "momentum_matrices", "table"]

if __name__ == "__main__":
    main()
