"""Which methods pass the accuracy gates, by the spectra suites on the CPU.

    python -m launch.bench.gates --out gates.jsonl [--rows 256] [--aspects 1,4]
        [--momentum FILE] [--input bfloat16]

Half precision on the CPU means products in fp32 that are rounded once, as on tensor cores. Writes
one line per suite, method and dtype, and prints the worst cases as a table. ``--momentum`` adds
the matrices of a file written by ``torch.save``: a dict of names (or any keys) to 2-D tensors.
With ``--input bfloat16`` every matrix is rounded to that first, the exact one too: ``fast`` reads
such input in its products.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flashns_dist.orthogonalize import METHODS, orthogonalize
from flashns_dist.testing.spectra import (
    PolarFactor,
    adversarial,
    flat_tops,
    largest_singular_value,
    orthogonality_error,
    polar_factor,
    spectra,
)
from launch.bench.timing import Record

MAX_SIGMA, MAX_RATIO, SMALL_ERROR = 1.25, 1.02, 0.115
CANDIDATES = [(name, torch.float16, None) for name in METHODS] + [
    ("aol", torch.float16, "aol_flash"),
    ("standard", torch.bfloat16, None),
    ("gram", torch.bfloat16, None),
    ("unbiased", torch.bfloat16, None),
    ("fast", torch.bfloat16, None),
]
INPUTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Case = tuple[Tensor, PolarFactor, float]


def suites(rows: int, aspects: list[float], momentum: Path | None) -> Iterator[tuple[str, dict]]:
    """Names of suites and their matrices by name."""
    for aspect in aspects:
        yield f"spectra, aspect {aspect:g}", spectra(rows, aspect)
        yield f"adversarial, aspect {aspect:g}", adversarial(rows, aspect)
        yield f"flat tops, aspect {aspect:g}", flat_tops(rows, aspect)
    if momentum is not None:
        found = torch.load(momentum, weights_only=True)
        yield "momentum", {str(key): value.double() for key, value in found.items()}


def prepare(matrices: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Case]:
    """Each matrix with its exact polar factor and the error of ``gram`` in float16."""
    cases = {}
    for name, whole in matrices.items():
        x = whole.to(dtype)
        exact = polar_factor(whole if dtype == torch.float32 else x.double())
        reference = orthogonalize(x.float(), method="gram", dtype=torch.float16)
        cases[name] = x, exact, orthogonality_error(reference, exact)
    return cases


def measure(record: Record, suite: str, cases: dict[str, Case]) -> None:
    """Measures every candidate on a suite and prints a row for each."""
    print(f"\n{suite}: {len(cases)} matrices\n")
    print("| method | dtype | sigma_max | mean EF | worst EF / gram | gates failed |")
    print("|---|---|---|---|---|---|")
    for method, dtype, coefficients in CANDIDATES:
        errors, sigmas, ratios, failed = {}, {}, [0.0], 0
        for name, (x, exact, reference) in cases.items():
            result = orthogonalize(x, method=method, dtype=dtype, coefficients=coefficients)
            error = orthogonality_error(result, exact)
            sigma = largest_singular_value(result)
            errors[name], sigmas[name] = round(error, 5), round(sigma, 5)
            if error > SMALL_ERROR:
                ratios.append(error / reference)
            failed += sigma > MAX_SIGMA or error > max(MAX_RATIO * reference, SMALL_ERROR)
        record.write(
            "gates", suite=suite, input=str(x.dtype), method=method,
            coefficients=coefficients, dtype=str(dtype),
            worst_over_gram=round(max(ratios), 5), gates_failed=failed, errors=errors,
            sigmas=sigmas,
        )  # fmt: skip
        label = method if coefficients is None else f"{method}, {coefficients}"
        print(
            f"| {label} | {str(dtype)[6:]} | {max(sigmas.values()):.2f} | "
            f"{sum(errors.values()) / len(errors):.3f} | "
            f"{max(ratios):.2f} | {failed} |",
            flush=True,
        )


def main() -> None:
    """Measures all suites."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gates.jsonl"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--aspects", default="1,4")
    parser.add_argument("--momentum", type=Path)
    parser.add_argument("--input", choices=sorted(INPUTS), default="float32")
    options = parser.parse_args()
    record = Record(options.out)
    aspects = [float(aspect) for aspect in options.aspects.split(",")]
    for suite, matrices in suites(options.rows, aspects, options.momentum):
        measure(record, suite, prepare(matrices, INPUTS[options.input]))


if __name__ == "__main__":
    main()
