"""The fused passes of a plan: tables at setup, addresses in each step, one launch per pass."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashns_dist.exchange import Exchange, Transfer
from flashns_dist.layout import Block, Box
from flashns_dist.optim.binding import BoundParameter
from flashns_dist.optim.fused.rows import Rows, rows_of
from flashns_dist.optim.fused.tables import (
    BLOCK,
    FIRST_BATCH,
    GATHER_RECEIVE,
    GATHER_SEND,
    SCATTER_RECEIVE,
    SCATTER_SEND,
    BucketPasses,
    Table,
    matched_pieces,
    segment_rows,
)
from flashns_dist.optim.learning_rate import learning_rate_scale
from flashns_dist.optim.rules import MATRIX_RULES
from flashns_dist.optim.rules.muon import Muon, decay_and_rate

if TYPE_CHECKING:
    from flashns_dist.orthogonalize.kernels.triton_prepared import Launch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPTURED = ("method", "ns_coefficients", "ns_steps", "ns_dtype", "backend", "eps")


class FusedPasses:
    """The fused passes of one plan on one rank.

    A bucket is fused if all of its pieces and segments are rows of memory in dtypes that the
    kernels take, and its rules are elementwise as Muon's before and after the owner.

    Args:
        bound: The matrix parameters of one process group.
        exchange: Made for the plan.
        groups: ``param_groups`` of the optimizer.
        batches: For each bucket, the stacks on the owner: shapes, and indices of their matrices.

    Attributes:
        permission: ``(1,)`` int32 on the device. While it is 0, the kernels change neither momenta
            nor weights.
    """

    def __init__(
        self,
        bound: Sequence[BoundParameter],
        exchange: Exchange,
        groups: Sequence[Mapping[str, Any]],
        batches: Sequence[Sequence[tuple[tuple[int, int], list[int]]]],
    ) -> None:
        self._bound = bound
        self._exchange = exchange
        self._groups = groups
        self._device = bound[0].local(bound[0].storage).device
        self._kinds: dict[tuple[int, tuple[int, int]], int] = {}
        self._block_states = [self._names_of_block_states(each) for each in bound]
        self._made_for = self._fixed(groups, self._weights())
        self.not_fused: list[str] = []
        self._buckets = [self._bucket(bucket, stacks) for bucket, stacks in enumerate(batches)]
        self._parameters = torch.zeros((len(bound), 3), dtype=torch.int64, device=self._device)
        shape = (max(len(self._kinds), 1), 7)
        self._factors = torch.zeros(shape, dtype=torch.float32, device=self._device)
        self.permission = torch.ones(1, dtype=torch.int32, device=self._device)
        self._gradient_dtype: torch.dtype | None = torch.float32
        self._is_aligned = True
        self._block_addresses: list[int] = []
        self._later: list[tuple[Tensor, list[Any]]] | None = None
        self._uploaded: dict[int, list[Any]] = {}
        self._launches: Any = _launch_table(16 * len(batches)) if self.num_fused else None
        self._calls: dict[tuple[Any, ...], tuple[list[int], Launch]] = {}

    # Setup ------------------------------------------------------------------------------------

    def _bucket(
        self, bucket: int, stacks: Sequence[tuple[tuple[int, int], list[int]]]
    ) -> BucketPasses | None:
        schedule = self._exchange.schedules[bucket]
        # The rules of all matrices, held here or not: their hooks may make collectives.
        plan = self._exchange.plan
        every = {plan.matrices[index].tensor for index in plan.buckets[bucket]}
        names = {self._bound[tensor].name for tensor in every if not self._has_rule(tensor)}
        names |= {
            self._bound[self._exchange.plan.matrices[index].tensor].name
            for index, _ in schedule.held
            if not self._has_memory(self._exchange.plan.matrices[index].tensor)
        }
        dtypes = {
            self._bound[self._exchange.plan.matrices[index].tensor].storage.dtype
            for index, _ in schedule.held
        }
        possible = fusing_possible(self._device) and self._exchange.dtype in _DTYPES
        if names or len(dtypes) > 1 or not possible:
            self.not_fused += sorted(names) or [f"bucket {bucket}"]
            return None
        owned = {
            index: (number, slot)
            for number, (_, indices) in enumerate(stacks)
            for slot, index in enumerate(indices)
        }

        def inside(index: int, part: int, box: Box) -> tuple[int, Rows | None]:
            number, slot = owned[index]
            block: Block = self._exchange.plan.matrices[index].block
            shape = (len(stacks[number][1]), *stacks[number][0])
            matrix = torch.empty(shape, device="meta")[slot]
            return number, rows_of(block.view(matrix, part, box))

        places: list[list[tuple[int, Rows | None]]] = [[] for _ in schedule.held]
        sources: list[tuple[int, Rows | None]] = [(-1, None)] * len(schedule.held)
        unpack: list[tuple[int, Rows | None, int, Rows | None]] = []
        pack: list[tuple[int, Rows | None, int, Rows | None]] = []
        for segment in schedule.gather.sends:
            places[segment.held].append((GATHER_SEND, segment_rows(segment)))
        for segment in schedule.gather.local:
            number, rows = inside(segment.matrix, segment.part, segment.box)
            places[segment.held].append((FIRST_BATCH + number, rows))
        for segment in schedule.gather.receives:
            number, rows = inside(segment.matrix, segment.part, segment.box)
            unpack.append((GATHER_RECEIVE, segment_rows(segment), FIRST_BATCH + number, rows))
        results = FIRST_BATCH + len(stacks)
        for segment in schedule.scatter.sends:
            number, rows = inside(segment.matrix, segment.part, segment.box)
            pack.append((results + number, rows, SCATTER_SEND, segment_rows(segment)))
        for segment in schedule.scatter.receives:
            sources[segment.held] = (SCATTER_RECEIVE, segment_rows(segment))
        for segment in schedule.scatter.local:
            number, rows = inside(segment.matrix, segment.part, segment.box)
            sources[segment.held] = (results + number, rows)
        momentum: list[tuple[int, Rows | None, int, Rows | None, int]] = []
        update: list[tuple[int, Rows | None, int, Rows | None, int]] = []
        for (index, piece), found, source in zip(schedule.held, places, sources, strict=True):
            tensor = self._exchange.plan.matrices[index].tensor
            local = torch.empty_like(
                self._bound[tensor].local(self._bound[tensor].storage), device="meta"
            )
            rows = rows_of(piece.view(local))
            kind = self._kind(tensor, self._exchange.plan.matrices[index].block)
            if len(found) > 1:  # several owners repeat the work
                self.not_fused.append(self._bound[tensor].name)
                return None
            place, target = found[0] if found else (-1, rows)
            momentum.append((tensor, rows, place, target, kind))
            update.append((tensor, rows, *source, kind))
        tables = [
            matched_pieces([(*entry, 0) for entry in unpack]),
            matched_pieces([(*entry, 0) for entry in pack]),
            matched_pieces(momentum),
            matched_pieces(update),
        ]
        if any(table is None for table in tables):
            self.not_fused += sorted({self._bound[t].name for t, *_ in momentum})
            return None
        unpacked, packed, moved, updated = (table or [] for table in tables)
        dtype = dtypes.pop() if dtypes else torch.float32
        return BucketPasses(moved, unpacked, packed, updated, len(stacks), dtype, self._device)

    def _has_rule(self, tensor: int) -> bool:
        """Whether a parameter's rule does what the kernels do, and nothing else."""
        return has_fused_rule(self._groups[self._bound[tensor].group_index])

    def _has_memory(self, tensor: int) -> bool:
        """Whether a parameter's dtype, rounding and memory are what the kernels take."""
        bound = self._bound[tensor]
        local = bound.local(bound.storage)
        rounding = self._groups[bound.group_index]["rounding"]
        return is_fused_dtype(local.dtype, rounding) and local.is_contiguous()

    def _kind(self, tensor: int, block: Block) -> int:
        """Number of the row of factors that a piece takes."""
        key = (self._bound[tensor].group_index, block.shape)
        return self._kinds.setdefault(key, len(self._kinds))

    def _names_of_block_states(self, bound: BoundParameter) -> list[str]:
        """States that rules read and write where they lie, not through the tables."""
        group = self._groups[bound.group_index]
        rule = MATRIX_RULES[group["update_rule"]]
        return sorted({name for block in bound.blocks for name in rule.block_states(group, block)})

    def _weights(self) -> list[Tensor]:
        return [bound.local(bound.storage) for bound in self._bound]

    def _fixed(
        self, groups: Sequence[Mapping[str, Any]], weights: Sequence[Tensor]
    ) -> list[tuple[object, object]]:
        """What decides whether the kernels take a piece: settings, and the weights' memory."""
        indices = sorted({bound.group_index for bound in self._bound})
        return [
            *((groups[i]["update_rule"], groups[i]["rounding"]) for i in indices),
            *((weight.dtype, weight.is_contiguous()) for weight in weights),
        ]

    # Step -------------------------------------------------------------------------------------

    def begin(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, Mapping[str, Any]],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Tell the kernels where this step's parameters are, and the present settings.

        Args:
            groups: ``param_groups`` of the optimizer now: other objects, perhaps, than at setup.
            state: Of the optimizer.
            gradients: This rank's part of each bound parameter's gradient.
        """
        self._groups = groups
        addresses = []
        dtypes: set[torch.dtype | None] = set()
        weights = self._weights()
        for bound, weight, gradient in zip(self._bound, weights, gradients, strict=True):
            found = 0
            if gradient is not None and gradient.numel():
                dtypes.add(gradient.dtype if gradient.is_contiguous() else None)
                found = gradient.data_ptr()
            momentum = bound.local(state[bound.storage]["momentum_buffer"])
            if weight.is_contiguous() and not momentum.is_contiguous():  # as loaded
                dtypes.add(None)
            kept = torch.promote_types(weight.dtype, torch.float32), weight.device
            if (momentum.dtype, momentum.device) != kept:  # as the kernels take it
                dtypes.add(None)
            addresses.append((found, momentum.data_ptr(), weight.data_ptr()))
        usable = len(dtypes) <= 1 and dtypes <= {*_DTYPES}
        usable = usable and self._fixed(groups, weights) == self._made_for
        self._gradient_dtype = (dtypes or {torch.float32}).pop() if usable else None
        self._is_aligned = all(address % 16 == 0 for row in addresses for address in row)
        self._block_addresses = [
            state[bound.storage][name].data_ptr()
            for bound, names in zip(self._bound, self._block_states, strict=True)
            for name in names
        ]
        self._upload(self._parameters, addresses)
        self._upload(self._factors, [self._factors_of(*kind) for kind in self._kinds] or [[0] * 7])

    @property
    def is_usable(self) -> bool:
        """Whether the kernels take this step's gradients and settings."""
        return self._gradient_dtype is not None

    @property
    def signature(self) -> tuple[object, ...]:
        """What of this step is in a captured graph, beside what the tables hold."""
        indices = sorted({bound.group_index for bound in self._bound})
        settings = []
        for group in (self._groups[index] for index in indices):
            keys = (*_CAPTURED, *sorted(MATRIX_RULES[group["update_rule"]].settings))
            settings += [repr(group[key]) for key in keys]
        return self._gradient_dtype, self._is_aligned, *self._block_addresses, *settings

    @property
    def num_fused(self) -> int:
        """Buckets that the kernels take."""
        return sum(found is not None for found in self._buckets)

    def _factors_of(self, group_index: int, shape: tuple[int, int]) -> list[float]:
        group = self._groups[group_index]
        scale = learning_rate_scale(group["adjust_lr_fn"], shape)
        mu = float(group["momentum"])
        decay, rate = decay_and_rate(group, scale)
        return [
            *(mu, 1 - mu, float(group["nesterov"])),
            *(rate, decay, 1 - decay, float(group["cautious"])),
        ]

    def is_fused(self, bucket: int) -> bool:
        """Whether the kernels take a bucket in this step."""
        return self._buckets[bucket] is not None and self.is_usable

    def momentum(
        self, bucket: int, batches: Sequence[Tensor], early: Transfer | None = None
    ) -> None:
        """Update the momenta; write the directions into the send buffer and the batches.

        What ``early`` has received is what ``unpack`` then reads.
        """
        tables = self._tables(bucket)
        addresses = self._exchange.addresses(bucket)
        if early is not None:
            addresses[GATHER_RECEIVE] = early.received.data_ptr()
        self._upload(tables.buffers[:FIRST_BATCH], addresses)
        if batches:
            found = [batch.data_ptr() for batch in batches]
            self._upload(tables.buffers[FIRST_BATCH : FIRST_BATCH + len(found)], found)
        constants = {"GRADIENT": _triton_dtype(self._gradient_dtype)}
        self._launch("momentum_kernel", tables, tables.momentum, constants)

    def unpack(self, bucket: int) -> None:
        """Write what has been received into the batches."""
        tables = self._tables(bucket)
        self._launch("copy_kernel", tables, tables.unpack, {})

    def pack(self, bucket: int, results: Sequence[Tensor]) -> None:
        """Write the results into the send buffer."""
        tables = self._tables(bucket)
        if results:
            begin = FIRST_BATCH + tables.num_batches
            self._upload(tables.buffers[begin:], [result.data_ptr() for result in results])
        self._launch("copy_kernel", tables, tables.pack, {})

    def update(self, bucket: int) -> None:
        """Weight decay and update, from the receive buffer and the results."""
        tables = self._tables(bucket)
        constants = {"WEIGHT": _triton_dtype(tables.weight_dtype)}
        self._launch("update_kernel", tables, tables.update, constants)

    def _tables(self, bucket: int) -> BucketPasses:
        found = self._buckets[bucket]
        assert found is not None
        return found

    def _launch(
        self, name: str, tables: BucketPasses, table: Table | None, constants: dict[str, Any]
    ) -> None:
        if table is None:
            return
        is_aligned = table.is_aligned and self._is_aligned
        key = (name, table, is_aligned, *constants.values())
        call = self._calls.get(key)
        if call is None:
            constants = constants | {
                "WIRE": _triton_dtype(self._exchange.dtype),
                "FLAT": table.is_flat,
                "ALIGNED": is_aligned,
                "BLOCK": BLOCK,
            }
            call = self._calls[key] = self._call(name, tables, table, constants)
        addresses, launch = call
        device = self._device.index if self._device.type == "cuda" else -1
        self._launches.launch(key, device, addresses, lambda: launch)

    def _call(
        self, name: str, tables: BucketPasses, table: Table, constants: dict[str, Any]
    ) -> tuple[list[int], Launch]:
        """A launch, all of whose arguments are tables, and their addresses, which never change."""
        from flashns_dist.orthogonalize.kernels.triton_prepared import Launch

        arguments: list[Tensor] = [table.pieces]
        if name != "copy_kernel":
            arguments.append(table.kinds)
        arguments += [table.chunk_piece, table.chunk_start]
        if name != "copy_kernel":
            arguments.append(self._parameters)
        arguments.append(tables.buffers)
        if name != "copy_kernel":
            arguments += [self._factors, self.permission]
        options = {"num_warps": 8, "enable_fp_fusion": False}
        launch = Launch(
            _kernel(name), (table.num_chunks,), tuple(arguments), (), constants, options
        )
        return [argument.data_ptr() for argument in arguments], launch

    # CUDA graphs ------------------------------------------------------------------------------

    def postpone_uploads(self) -> Callable[[], None]:
        """While a graph is captured: keep addresses on the host.

        Returns:
            What to call after the capture, to upload them.
        """
        later: list[tuple[Tensor, list[Any]]] = []
        self._later = later

        def finish() -> None:
            self._later = None
            for target, values in later:
                self._upload(target, values)

        return finish

    def _upload(self, target: Tensor, values: Sequence[Any]) -> None:
        if self._later is not None:
            self._later.append((target, list(values)))
            return
        values, place = list(values), target.data_ptr()
        if self._uploaded.get(place) == values:
            return
        self._uploaded.pop(place, None)
        # From pinned memory the copy waits for nothing, and the host does not wait for it.
        pin = target.device.type == "cuda"
        source = torch.tensor(values, dtype=target.dtype, device="cpu", pin_memory=pin)
        target.copy_(source, non_blocking=True)
        if not (pin and torch.cuda.is_current_stream_capturing()):  # or it is not done yet
            self._uploaded[place] = values


def has_fused_rule(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group's rule does what the kernels do, and nothing else."""
    rule = type(MATRIX_RULES[group["update_rule"]])
    return rule.before is Muon.before and rule.after is Muon.after and not rule.selects


def is_fused_dtype(dtype: torch.dtype, rounding: str) -> bool:
    """Whether the kernels take weights of a dtype that are rounded so."""
    return dtype in _DTYPES and (dtype == torch.float32 or rounding == "nearest")


def fusing_possible(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU with Triton, or Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if not os.environ.get("TRITON_INTERPRET"):
        return False  # without importing Triton
    from flashns_dist.orthogonalize.kernels.triton_interpreter import interpreting, repair

    if interpreting():
        repair()
    return interpreting()


def _launch_table(limit: int) -> Any:
    from flashns_dist.orthogonalize.kernels.triton_prepared import LaunchTable

    return LaunchTable(limit)


def _kernel(name: str) -> Any:
    from flashns_dist.optim.fused import kernels

    return getattr(kernels, name)


def _triton_dtype(dtype: torch.dtype | None) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype or torch.float32
    ]
