"""What orthogonalizing and moving matrices costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from math import inf
from pathlib import Path


@dataclass(frozen=True)
class CostModel:
    """Predicts seconds from shapes and bytes. Only ratios matter for balance.

    The defaults describe one H200 (measured anchors: 790 TFLOP/s for large half-precision products,
    174-336 GB/s out per GPU in an all-to-all of 64 MB to 2 GB on four GPUs of one host). They need
    not be exact: a wrong model makes a plan slower, never wrong. ``flashns_dist.optim.calibration``
    measures one for a machine; the host times are those of one.

    Attributes:
        cube_flops, wide_flops: FLOPs of one orthogonalization are
            ``cube_flops n^3 + wide_flops n^2 m`` for the short side n and the long side m; the
            defaults fit what ``auto`` takes on the shapes of docs/benchmarks within 12 %, but for
            512 x 2048, a quarter less, and 512 x 32768, which moves memory for longer than that.
        flops_per_second: Rate reached on large matrices.
        half_rate_size: Short side at which half of that rate is reached.
        matrix_seconds: Fixed cost of one matrix.
        stack_seconds: Of the device, fixed cost of one stack of matrices: its kernels begin and
            end. What is in ``measured`` holds its own.
        link_bytes_per_second: Bytes that one rank sends in a second.
        exchange_seconds: Latency of one collective.
        memory_bytes_per_second: At which the elementwise passes read and write.
        before_bytes, after_bytes: That these passes read and write per stored element: gradient,
            momentum twice and the packed direction; the result and the weight twice.
        copy_bytes: The same per owned element: into the batch, and into the send buffer.
        batch_seconds: Of the host, to launch the orthogonalization of one batch.
        bucket_seconds: Of the host, for the rest of one bucket.
        step_seconds: Of the host, for one step: agreement on the gradients, say.
        measured: (short side, long side, batch, seconds on the device) of orthogonalizations that
            were measured; where there are any, the formula only interpolates between them.

    Raises:
        ValueError: A rate or what was measured is not positive, or another number negative.
    """

    cube_flops: float = 9.5
    wide_flops: float = 5.0
    flops_per_second: float = 815e12
    half_rate_size: float = 512.0
    matrix_seconds: float = 2e-6
    stack_seconds: float = 100e-6
    link_bytes_per_second: float = 250e9
    exchange_seconds: float = 40e-6
    memory_bytes_per_second: float = 3.6e12
    before_bytes: float = 14.0
    after_bytes: float = 10.0
    copy_bytes: float = 8.0
    batch_seconds: float = 400e-6
    bucket_seconds: float = 300e-6
    step_seconds: float = 1200e-6
    measured: tuple[tuple[int, int, int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "measured"):
            value = getattr(self, name)
            is_rate = name.endswith("_per_second")
            if not _is_number(value) or not (value > 0 if is_rate else 0 <= value < inf):
                bound = "must be positive" if is_rate else "must be finite and not negative"
                raise ValueError(f"{name}={value!r} of a cost model {bound}")
        for point in self.measured:
            if len(point) != 4 or not all(_is_number(value) and value > 0 for value in point):
                raise ValueError(
                    f"measured has {point!r}: give (short side, long side, batch, seconds), each "
                    "positive"
                )

    def orthogonalize_seconds(self, rows: int, cols: int) -> float:
        """Seconds of the device for one ``(rows, cols)`` matrix in a large batch."""
        n, m = min(rows, cols), max(rows, cols)
        return self._formula(n, m) * self._correction(n, m, 0)

    def orthogonalize_batch_seconds(self, rows: int, cols: int, batch: int) -> float:
        """Seconds of the device for a ``(batch, rows, cols)`` stack."""
        n, m = min(rows, cols), max(rows, cols)
        fixed = 0.0 if self.measured else self.stack_seconds
        return fixed + batch * self._formula(n, m) * self._correction(n, m, batch)

    def wire_seconds(self, num_bytes: float) -> float:
        """Seconds for a rank to send ``num_bytes``, latency not included."""
        return num_bytes / self.link_bytes_per_second

    def memory_seconds(self, num_bytes: float) -> float:
        """Seconds for elementwise passes that read and write ``num_bytes`` in all."""
        return num_bytes / self.memory_bytes_per_second

    def without_launches(self) -> CostModel:
        """The same machine where a step is replayed from a CUDA graph."""
        return replace(self, batch_seconds=0.0, bucket_seconds=0.0)

    def save(self, path: Path | str, **facts: object) -> None:
        """Write as JSON, with ``facts`` beside it for the reader."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"cost": asdict(self), **facts}, indent=1))

    @classmethod
    def load(cls, path: Path | str) -> CostModel:
        """Read what ``save`` wrote.

        Raises:
            ValueError: The file does not hold the fields of a cost model.
        """
        content = json.loads(Path(path).read_text())
        values = dict(content.get("cost", {})) if isinstance(content, dict) else {}
        unknown = set(values) - {field.name for field in fields(cls)}
        if not values or unknown:
            raise ValueError(
                f"{path}: not a cost model of this version ({sorted(unknown)}); measure it again"
            )
        values["measured"] = tuple(
            (int(n), int(m), int(batch), float(seconds))
            for n, m, batch, seconds in values.get("measured", ())
        )
        return cls(**values)

    def _formula(self, n: int, m: int) -> float:
        flops = self.cube_flops * float(n) ** 3 + self.wide_flops * float(n) ** 2 * m
        rate = self.flops_per_second * n / (n + self.half_rate_size)
        return self.matrix_seconds + flops / rate

    def _correction(self, n: int, m: int, batch: int) -> float:
        """Measured over predicted, from the three nearest shapes; batch 0 is the largest one.

        In arithmetic that rounds alike on every machine: no logarithms.
        """
        shapes = self._by_shape
        if not shapes:
            return 1.0
        exact = shapes.get((n, m))
        if exact is not None:
            return _per_matrix(exact, batch) / self._formula(n, m)
        near = sorted((_distance((n, m), shape), shape) for shape in shapes)[:3]
        weights = [1.0 / distance**2 for distance, _ in near]
        ratios = [_per_matrix(shapes[s], batch) / self._formula(*s) for _, s in near]
        return sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights)

    @cached_property
    def _by_shape(self) -> dict[tuple[int, int], list[tuple[int, float]]]:
        found: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for n, m, batch, seconds in sorted(self.measured):
            found.setdefault((n, m), []).append((batch, seconds))
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _distance(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How unlike two shapes are: 0 for equal ones, below 2."""
    return sum(abs(a - b) / (a + b) for a, b in zip(one, other, strict=True))


def _per_matrix(points: Sequence[tuple[int, float]], batch: int) -> float:
    """Seconds per matrix in a batch, from (batch, seconds) by ascending batch."""
    last_batch, last = points[-1]
    if batch <= 0 or batch >= last_batch:
        return last / last_batch
    below_batch, below = 0, 0.0
    for at, seconds in points:
        if at >= batch:
            if not below_batch:  # fewer than the smallest one: no faster
                return seconds / batch
            share = (batch - below_batch) / (at - below_batch)
            return (below + share * (seconds - below)) / batch
        below_batch, below = at, seconds
    return last / last_batch
