"""The device mesh: how the ranks of a run divide the work."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("ddp", "replicate", "fsdp", "tp")
"""Every axis name, outermost first. Ranks of the last axis are neighbours."""


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes that a run uses, in the order of `AXES`.

    `ddp` keeps whole parameters on each rank and averages gradients (DistributedDataParallel);
    `fsdp` shards parameters (FSDP2); `replicate` repeats the `fsdp` shards (HSDP); `tp` splits
    the matrices of a layer (tensor parallelism, with the sequence split between them).
    """

    axes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes) or "single"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes, outermost first."""
        return tuple(name for name, _ in self.axes)

    def size(self, name: str) -> int:
        """Return the size of an axis, 1 when the mesh does not have it."""
        return dict(self.axes).get(name, 1)

    @property
    def num_data_ranks(self) -> int:
        """Number of ranks that read different sequences."""
        return self.size("ddp") * self.size("replicate") * self.size("fsdp")

    def build(self, device_type: str) -> DeviceMesh | None:
        """Create the mesh; None for a run without a process group.

        Creates one process group per axis, on every rank.
        """
        if not self.axes:
            return None
        return init_device_mesh(
            device_type,
            tuple(size for _, size in self.axes),
            mesh_dim_names=self.names,
        )


def parse_mesh(text: str, world_size: int) -> MeshSpec:
    """Read a `--mesh` argument such as `fsdp`, `replicate=2,fsdp=2` or `fsdp,tp=2`.

    Args:
        text: Comma-separated `axis=size` pairs. One axis may come without a size: it takes the
            ranks that the others leave.
        world_size: Number of ranks that the sizes must multiply to.

    Raises:
        ValueError: An unknown, repeated or badly sized axis, a combination that is not
            supported, or sizes that do not multiply to `world_size`.
    """
    sizes: dict[str, int | None] = {}
    for item in text.split(","):
        name, _, size = item.strip().partition("=")
        if name not in AXES:
            raise ValueError(
                f"--mesh {text}: unknown axis {name!r}. Choose from {', '.join(AXES)}."
            )
        if name in sizes:
            raise ValueError(f"--mesh {text}: axis {name!r} is given twice. Give it once.")
        if size and not (size.isdecimal() and int(size) > 0):
            raise ValueError(f"--mesh {text}: size {size!r} of axis {name!r} is not a count.")
        sizes[name] = int(size) if size else None
    if "ddp" in sizes and len(sizes) > 1:
        raise ValueError(
            f"--mesh {text}: axis 'ddp' stands alone, since DistributedDataParallel takes no "
            "sharded parameters. Use 'replicate' with 'fsdp' or 'tp' instead."
        )
    filled = _fill_open_axis(text, sizes, world_size)
    if "ddp" not in filled:
        # FSDP2 also averages the gradients of 'replicate' alone and of 'tp' alone.
        filled.setdefault("fsdp", 1)
    return MeshSpec(tuple((name, filled[name]) for name in AXES if name in filled))


def _fill_open_axis(text: str, sizes: dict[str, int | None], world_size: int) -> dict[str, int]:
    known = 1
    for size in sizes.values():
        known *= size or 1
    open_axes = [name for name, size in sizes.items() if size is None]
    if len(open_axes) > 1:
        raise ValueError(
            f"--mesh {text}: axes {', '.join(open_axes)} have no size. Leave out one size at most."
        )
    if world_size % known or (not open_axes and known != world_size):
        raise ValueError(
            f"--mesh {text} asks for {'a multiple of ' if open_axes else ''}{known} ranks, and "
            f"torchrun started {world_size}. Change --mesh or --nproc-per-node."
        )
    return {name: world_size // known if size is None else size for name, size in sizes.items()}
