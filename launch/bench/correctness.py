"""Whether every candidate of ``launch.bench.kernels`` computes what it should."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flashns_dist.orthogonalize.coefficients import POLAR_EXPRESS
from flashns_dist.orthogonalize.gram import run_steps
from flashns_dist.orthogonalize.kernels.torch_ops import TorchKernels
from flashns_dist.orthogonalize.kernels.triton_backend import TritonKernels
from flashns_dist.orthogonalize.kernels.triton_configs import (
    PRODUCT_POINTER,
    PRODUCT_TMA,
    SYMMETRIC_POINTER,
    SYMMETRIC_TMA,
    TileConfig,
)


class Shapes(Protocol):
    """What is asked of ``launch.bench.kernels.Bench``."""

    generator: torch.Generator

    def random(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor: ...

    def smaller(self, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]: ...


def _forced(
    descriptors: tuple[TileConfig, ...], pointers: tuple[TileConfig, ...]
) -> list[tuple[str, TritonKernels]]:
    """A backend for each candidate, those of ``pointers`` without descriptors."""
    with_them = [(config.label(), TritonKernels(config=config)) for config in descriptors]
    return with_them + [
        (f"{config.label()} pointers", TritonKernels(config=config, descriptors=False))
        for config in pointers
    ]


def check(bench: Shapes) -> None:
    """Every candidate against float64 and against the others, launched twice."""
    symmetric = _forced(SYMMETRIC_TMA, SYMMETRIC_POINTER)
    products = _forced(PRODUCT_TMA, PRODUCT_POINTER)
    reference, device = TorchKernels(), bench.generator.device
    for batch, n, m in bench.smaller((3, 1000, 1512), (2, 328, 2048), (5, 129, 131)):
        for dtype in (torch.float16, torch.bfloat16):
            x = bench.random(batch, n, m, dtype=dtype)
            c = bench.random(batch, n, n, dtype=dtype)
            c = (c + c.mT) / 2
            wide = x.double()
            exact = 0.3 * wide @ wide.mT + 0.7 * c.double() + 0.1 * torch.eye(n, device=device)
            first: Tensor | None = None
            factor = torch.empty_like(c)
            for label, kernels in symmetric:
                try:
                    outs = [torch.full_like(c, torch.nan) for _ in range(2)]
                    for out in outs:
                        kernels.symmetric(x, x.mT, alpha=0.3, c=c, beta=0.7, gamma=0.1, out=out)
                except Exception as error:
                    print(f"  symmetric {label} {tuple(x.shape)}: {str(error)[:200]}")
                    continue
                out = outs[1]
                error = float((out.double() - exact).norm() / exact.norm())
                same = torch.equal(*outs) and (first is None or torch.equal(out, first))
                mirrored = torch.equal(out, out.mT)
                limit = 2 * torch.finfo(dtype).eps
                if not (same and mirrored and error < limit):
                    print(
                        f"  WRONG symmetric {label} {tuple(x.shape)} {dtype}: error "
                        f"{error:.2e}, same bits {same}, symmetric {mirrored}"
                    )
                first = out if first is None else first
                factor = out
            first = None
            exact = factor.double() @ wide + 2 * wide
            for label, kernels in products:
                try:
                    out = torch.full((batch, m, n), torch.nan, dtype=dtype, device=device)
                    kernels.product(factor, x, c=x, beta=2.0, transpose=True, out=out)
                except Exception as error:
                    print(f"  product {label} {tuple(x.shape)}: {str(error)[:200]}")
                    continue
                straight = kernels.product(factor, x, c=x, beta=2.0)
                error = float((out.mT.double() - exact).norm() / exact.norm())
                same = torch.equal(straight, out.mT) and (first is None or torch.equal(out, first))
                if not (same and error < 2 * torch.finfo(dtype).eps):
                    print(
                        f"  WRONG product {label} {tuple(x.shape)} {dtype}: error "
                        f"{error:.2e}, same bits {same}"
                    )
                first = out if first is None else first
    kernels = TritonKernels()
    for shape in bench.smaller((2, 100, 200), (2, 600, 1000), (1, 4096, 4096)):
        for size in (1e-42, 1e-30, 1.0, 1e30):
            x = torch.randn(*shape, device=device, generator=bench.generator) * size
            for transpose in (False, True):
                found, norms = kernels.normalize(x, dtype=torch.float16, transpose=transpose)
                want, _ = reference.normalize(x.double(), dtype=torch.float64, transpose=transpose)
                # Small entries are float16 subnormals, with a spacing of 6e-8.
                wrong = float((found.double() - want).abs().max() / want.abs().max())
                norm = x.double().flatten(1).norm(dim=1)
                off = float(((norms.double() - norm) / norm).abs().max())
                if wrong > 1e-3 or (off > 1e-5 and size > 1e-40):
                    print(f"  WRONG normalize {shape} {size} {transpose}: {wrong:.1e} {off:.1e}")
    for _, n, m in bench.smaller((4, 64, 256), (4, 100, 300), (4, 128, 4096)):
        x, _ = kernels.normalize(
            bench.random(4, n, m), dtype=torch.float16, transpose=False, scale=float(n) ** 0.5
        )
        rows = POLAR_EXPRESS.rows[:2]
        found, _ = kernels.gram_space(x, rows, alpha=1.0, scale=1.0 / n)
        separate, _ = run_steps(reference, reference.gram(x), rows, 1.0 / n)
        want, _ = run_steps(reference, reference.gram(x.double()), rows, 1.0 / n)
        errors = [float((v.double() - want).norm() / want.norm()) for v in (found, separate)]
        flag = "" if errors[0] < 3 * errors[1] else "WRONG "
        print(f"  {flag}gram_space {n}x{m}: error {errors[0]:.1e}, torch {errors[1]:.1e}")
    print("check: done")
