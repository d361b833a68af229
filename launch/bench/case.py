"""A model's matrices on a device mesh: as parameters, and as the planner sees them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from flashns_dist.layout import leading_blocks, placements_layout
from flashns_dist.orthogonalize import workspace_bytes
from flashns_dist.plan import Matrix
from launch.bench.models import MODELS, Shape, Shapes
from launch.world import World


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: As it was asked for: ``model[:rows][@RxS]``. ``rows`` shards the rows of every expert
            of a stack, instead of whole experts; ``@RxS`` makes R replicas over S shards each.
        shapes: Parameters.
        mesh: Ranks: shards, or replicas and shards.
        rows: Whether stacks are sharded by rows.
    """

    name: str
    shapes: Shapes
    mesh: tuple[int, ...]
    rows: bool

    def placements(self, shape: Shape) -> tuple[Placement, ...]:
        shard = Shard(len(shape) - 2 if self.rows else 0)
        return (shard,) if len(self.mesh) == 1 else (Replicate(), shard)

    def matrices(self) -> list[Matrix]:
        """For the planner."""
        return [
            Matrix(
                name,
                index,
                placements_layout(shape, self.placements(shape), self.mesh),
                block,
                workspace_bytes=workspace_bytes("auto", *block.shape),
            )
            for index, (name, shape) in enumerate(self.shapes)
            for block in leading_blocks(shape)
        ]


def parse_case(text: str, num_ranks: int) -> Case:
    """A case from its name.

    Raises:
        ValueError: The model is unknown, or the mesh does not have ``num_ranks`` ranks.
    """
    rest, _, mesh_text = text.partition("@")
    model, _, sharding = rest.partition(":")
    if model not in MODELS:
        raise ValueError(f"{text}: no model {model!r}; use one of {sorted(MODELS)}")
    if sharding not in ("", "rows"):
        raise ValueError(f'{text}: sharding {sharding!r} is unknown; use "rows", or nothing')
    mesh = tuple(int(size) for size in mesh_text.split("x")) if mesh_text else (num_ranks,)
    if prod(mesh) != num_ranks or len(mesh) > 2:
        raise ValueError(f"{text}: a mesh of {mesh} on {num_ranks} ranks; use R x S = {num_ranks}")
    return Case(text, MODELS[model](), mesh, sharding == "rows")


class Problem:
    """Parameters with gradients: fp32 DTensors, the same numbers after every ``refill``.

    Args:
        case: What to allocate.
        world: The ranks; their number is the mesh's.

    Raises:
        ValueError: A shape does not divide evenly.
    """

    def __init__(self, case: Case, world: World) -> None:
        self.case, self._device = case, world.device
        names = ("shard",) if len(case.mesh) == 1 else ("replicate", "shard")
        self.mesh: DeviceMesh = init_device_mesh(world.device.type, case.mesh, mesh_dim_names=names)
        self.named: list[tuple[str, nn.Parameter]] = []
        for name, shape in case.shapes:
            parameter = nn.Parameter(self._empty(shape))
            parameter.grad = self._empty(shape)
            self.named.append((name, parameter))

    def _empty(self, shape: Shape) -> DTensor:
        placements = self.case.placements(shape)
        dim, size = placements[-1].dim, self.case.mesh[-1]  # type: ignore[attr-defined]
        if shape[dim] % size:
            raise ValueError(f"{self.case.name}: {shape} is not even on {size} shards")
        local = [*shape]
        local[dim] //= size
        value = torch.empty(local, device=self._device)
        return DTensor.from_local(value, self.mesh, placements, run_check=False)

    def refill(self) -> None:
        """Random weights and gradients, equal on replicas."""
        generator = torch.Generator(self._device)
        generator.manual_seed(1 + self.mesh.get_local_rank("shard"))
        for _, parameter in self.named:
            local_of(parameter.detach()).normal_(0, 0.02, generator=generator)
            assert parameter.grad is not None
            local_of(parameter.grad).normal_(0, 1e-3, generator=generator)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]


def local_of(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
