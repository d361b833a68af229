"""Small models of megatron-core's, data that does not depend on the ranks, and how to train."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.integrations.megatron_cpu import checkpoint_writers, megatron_on_cpu
from tests.integrations.megatron_layers import (
    add_convolutions,
    allow_fp32,
    layer_spec,
    positions_here,
)

WIDTH, HEADS, GROUPS, VOCABULARY, LENGTH = 32, 4, 2, 64, 8
BATCH = 8
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    virtual: int = 0
    instances: int = 1
    dtype: str = "fp32"
    distributed: bool = True
    overlap: bool = False
    bucket_size: int | None = None
    sequence_parallel: bool = False
    gated: bool = False
    tied: bool = False
    experts: int = 0
    packed: bool = False
    convolutions: bool = False
    per_token_loss: bool = False
    layers: int = 2
    micro_batches: int = 2
    clip: float = 1.0
    optimizer: str = "flashmuon"
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def alone(self) -> Case:
        """The same model and global batch in one process."""
        one = {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": None, "virtual": 0, "instances": 1}
        off = dict.fromkeys(("sequence_parallel", "overlap", "per_token_loss", "packed"), False)
        return replace(self, **one, **off)


def skip_what_this_megatron_lacks(case: Case) -> None:
    import megatron.core

    if case.packed:
        pytest.importorskip("megatron.core.transformer.moe.grouped_gemm_util", reason="0.16 only")
    minor = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
    if case.etp is not None and case.ep == 1 and minor < (0, 19):
        pytest.skip("FlashMuon refuses it: before 0.19 copies of experts drift apart")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_CHUNKS: list[Any] = []  # of the present job


@contextmanager
def megatron_ready(case: Case) -> Iterator[None]:
    """Megatron on this rank's process group, with its groups as the case says."""
    warnings.filterwarnings("ignore")
    from flashns_dist.integrations.megatron import install
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator

    install()
    with megatron_on_cpu():
        options: dict[str, Any] = {}
        if case.instances > 1:
            options["num_distributed_optimizer_instances"] = case.instances
        parallel_state.initialize_model_parallel(
            case.tp,
            case.pp,
            virtual_pipeline_model_parallel_size=case.virtual or None,
            context_parallel_size=case.cp,
            expert_model_parallel_size=case.ep,
            expert_tensor_parallel_size=case.etp,
            **options,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            unset_num_microbatches_calculator()
            parallel_state.destroy_model_parallel()
            for method in vars(RotaryEmbedding).values():  # caches that hold 32 models' groups
                if hasattr(method, "cache_clear"):
                    method.cache_clear()
            while _CHUNKS:  # cycles through autograd's nodes, which are not collected
                _CHUNKS.pop().grad_accs.clear()


def make_config(case: Case) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    extra: dict[str, Any] = {}
    if case.gated:
        extra.update(gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    if case.experts:
        extra.update(
            num_moe_experts=case.experts,
            moe_grouped_gemm=False,
            moe_token_dispatcher_type="alltoall" if case.ep > 1 else "allgather",
            moe_router_topk=2,
            moe_aux_loss_coeff=0.0,
        )
    if case.packed:
        extra.update(moe_grouped_gemm=True, moe_use_legacy_grouped_gemm=True)
    if case.virtual:
        extra["virtual_pipeline_model_parallel_size"] = case.virtual
    return TransformerConfig(
        num_layers=case.layers,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=2 * WIDTH,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        calculate_per_token_loss=case.per_token_loss,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        sequence_parallel=case.sequence_parallel,
        bf16=case.dtype == "bf16",
        fp16=case.dtype == "fp16",
        params_dtype=DTYPES[case.dtype],
        pipeline_dtype=DTYPES[case.dtype],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **extra,
    )


def make_chunks(case: Case) -> list[Any]:
    """The model's chunks of this rank, wrapped, with weights that do not depend on the ranks."""
    from megatron.core import parallel_state as state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module

    config = make_config(case)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed,
        bucket_size=case.bucket_size,
        num_distributed_optimizer_instances=case.instances,
        check_for_nan_in_grad=False,
    )
    chunks: list[Any] = []
    for number in range(case.virtual or 1):
        stage = {"ignore_virtual": False, "vp_stage": number} if case.virtual else {}
        model = GPTModel(
            config,
            layer_spec(case.experts, case.cp, packed=case.packed),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            pre_process=state.is_pipeline_first_stage(**stage),
            post_process=state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=case.tied,
            position_embedding_type="rope",
            **({"vp_stage": number} if case.virtual else {}),
        )
        if case.convolutions and model.pre_process:
            add_convolutions(model)
        fill(model, case)
        allow_fp32(model)
        if case.dtype != "fp32":
            model = Float16Module(config, model)
        chunks.append(DistributedDataParallel(config, ddp, model, disable_bucketing=number > 0))
        _CHUNKS.append(chunks[-1])
    config.finalize_model_grads_func = finalize_model_grads
    if case.overlap:
        config.no_sync_func = [c.no_sync for c in chunks]
        config.grad_sync_func = [c.start_grad_sync for c in chunks]
        if len(chunks) == 1:
            config.no_sync_func, config.grad_sync_func = (
                config.no_sync_func[0],
                config.grad_sync_func[0],
            )
    return chunks


def global_names(model: Any, case: Case) -> dict[str, Tensor]:
    """Parameters by names that count layers and experts over all ranks."""
    from megatron.core import parallel_state as state

    found = {}
    for name, param in model.named_parameters():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            parts[at] = str(model.decoder.layers[int(parts[at])].layer_number - 1)
        if "local_experts" in parts:
            at = parts.index("local_experts") + 1
            local = case.experts // case.ep
            first = state.get_expert_model_parallel_rank() * local
            parts[at] = str(first + int(parts[at]))
        found[".".join(parts)] = param
    return found


def fill(model: Any, case: Case) -> None:
    """Weights from their names."""
    for name, param in global_names(model, case).items():
        with torch.no_grad():
            if name.endswith(("experts.weight1", "experts.weight2")):
                param.copy_(packed_value(name, param, case))
            else:
                param.copy_(shard_of(start_value(name, param, case), param, case))


def packed_value(name: str, param: Tensor, case: Case) -> Tensor:
    """The weights that ``SequentialMLP`` would have, transposed and packed; no tensor parallel."""
    from megatron.core import parallel_state as state

    path, _, kind = name.rpartition(".weight")
    local = case.experts // case.ep
    first = state.get_expert_model_parallel_rank() * local
    shape = (4 * WIDTH, WIDTH) if kind == "1" else (WIDTH, 2 * WIDTH)
    names = [f"{path}.local_experts.{first + i}.linear_fc{kind}.weight" for i in range(local)]
    wholes = [start_value(n, torch.empty(shape), case) for n in names]
    return torch.stack([whole.T for whole in wholes]).reshape(param.shape)


def start_value(name: str, param: Tensor, case: Case) -> Tensor:
    """The whole weight of this name."""
    if case.tied and name == "output_layer.weight":
        name = "embedding.word_embeddings.weight"
    whole = random_like(name, full_shape(param, case))
    if whole.ndim > 1:
        return whole / sqrt(whole.shape[-1])
    return 1 + 0.1 * whole if name.endswith("weight") else 0.1 * whole


def random_like(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    number = zlib.crc32(f"{name}:{seed}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def num_shards(param: Tensor, case: Case) -> int:
    """Tensor-parallel degree; Megatron marks parameters of experts by ``allreduce``."""
    return case.tp if case.etp is None or getattr(param, "allreduce", True) else case.etp


def cut_dim(param: Tensor, case: Case) -> int:
    if num_shards(param, case) == 1 or not getattr(param, "tensor_model_parallel", False):
        return -1
    return int(param.partition_dim)


def full_shape(param: Tensor, case: Case) -> tuple[int, ...]:
    dim = cut_dim(param, case)
    shards = num_shards(param, case)
    return tuple(n * shards if axis == dim else n for axis, n in enumerate(param.shape))


def shard_of(whole: Tensor, param: Tensor, case: Case) -> Tensor:
    """This rank's tensor-parallel shard; of a gated fc1, a piece of either half."""
    from megatron.core import parallel_state as state

    dim = cut_dim(param, case)
    if dim < 0:
        return whole
    rank = state.get_tensor_model_parallel_rank()
    if getattr(param, "partition_stride", 1) == 2:
        return torch.cat([half.chunk(case.tp, dim)[rank] for half in whole.chunk(2, dim)], dim)
    return whole.chunk(case.tp, dim)[rank]


def make_optimizer(case: Case, chunks: list[Any]) -> Any:
    from flashns_dist.integrations.megatron import Settings
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    values = {
        "muon_momentum": 0.9,
        "muon_scale_mode": "shape_scaling",
        "lr": 0.02,
        "min_lr": 0.0,
        "weight_decay": 0.1,
        **case.config,
    }
    config = OptimizerConfig(
        optimizer=case.optimizer,
        bf16=case.dtype == "bf16",
        fp16=case.dtype == "fp16",
        initial_loss_scale=2.0**12,
        params_dtype=DTYPES[case.dtype],
        use_distributed_optimizer=case.distributed,
        clip_grad=case.clip,
        overlap_param_gather=case.overlap and case.distributed,
        **values,
    )
    if case.optimizer == "flashmuon":
        config.flashmuon = Settings(**{"wire_dtype": "fp32", **case.settings})
    return get_megatron_optimizer(config, chunks)


def batches(case: Case, step: int) -> list[list[tuple[Tensor, Tensor]]]:
    """This rank's micro-batches of a step, of the same global batch on any number of ranks."""
    from megatron.core import parallel_state as state

    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    ranks = state.get_data_parallel_world_size()
    mine = tokens.chunk(ranks)[state.get_data_parallel_rank()]
    here = positions_here(LENGTH)
    return [(p[:, here], p.roll(-1, 1)[:, here]) for p in mine.chunk(case.micro_batches)]


def train(
    case: Case, chunks: list[Any], optimizer: Any, steps: range
) -> list[tuple[float, float | None]]:
    """Losses (this rank's mean, 0 where the pipeline does not end) and gradient norms."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    config = get_model_config(chunks[0])
    if case.dtype == "fp16":
        config.grad_scale_func = optimizer.scale_loss
    run = get_forward_backward_func()
    history = []
    for step in steps:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        data = batches(case, step)
        iterators = [iter(data) for _ in chunks]
        losses = run(
            forward_step_func=_forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(data),
            seq_length=LENGTH,
            micro_batch_size=len(data[0][0]),
            forward_only=False,
        )
        done, norm, _ = optimizer.step()
        mean = sum(float(entry["loss"]) for entry in losses) / len(data) if losses else 0.0
        history.append((mean, float(norm) if done else None))
    return history


def _forward(data: Any, model: Any) -> Any:
    tokens, labels = next(data)
    positions = positions_here(LENGTH).expand(tokens.shape)
    output = model(tokens, positions, None, labels=labels)

    def loss(values: Tensor) -> Any:
        total, count = values.float().sum(), values.numel()
        mean = total.detach() / count
        return total, torch.tensor(count, dtype=torch.int), {"loss": mean}

    return output, loss


def losses_of(case: Case, steps: int = STEPS) -> list[tuple[float, float | None]]:
    """Mean losses over all data, and gradient norms; on rank 0."""
    with megatron_ready(case):
        chunks = make_chunks(case)
        history = train(case, chunks, make_optimizer(case, chunks), range(steps))
        return collect(history)


def collect(history: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    from megatron.core import parallel_state as state

    everyone: list[Any] = [None] * dist.get_world_size()
    last = state.is_pipeline_last_stage(ignore_virtual=True)
    counted = last and state.get_tensor_model_parallel_rank() == 0
    dist.all_gather_object(everyone, history if counted else None)
    found = [h for h in everyone if h is not None]
    return [(sum(h[i][0] for h in found) / len(found), found[0][i][1]) for i in range(len(history))]


def unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def save(folder: str, chunks: list[Any], optimizer: Any, sharding: str | None) -> None:
    """Write a ``torch_dist`` checkpoint, as megatron.training does."""
    from megatron.core import dist_checkpointing

    state = _sharded(chunks, optimizer, sharding, is_loading=False)
    with checkpoint_writers():
        dist_checkpointing.save(state, folder)


def load(folder: str, chunks: list[Any], optimizer: Any, sharding: str | None) -> None:
    """Read a checkpoint that any number of ranks has written."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_sharded(chunks, optimizer, sharding, is_loading=True), folder)
    for number, chunk in enumerate(chunks):
        unwrapped(chunk).load_state_dict(loaded[f"model{number}"])
    optimizer.load_state_dict(loaded["optimizer"])


def _sharded(
    chunks: list[Any], optimizer: Any, sharding: str | None, *, is_loading: bool
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True}
    if sharding is not None:
        metadata["distrib_optim_sharding_type"] = sharding
    state = {
        f"model{number}": unwrapped(chunk).sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(chunks)
    }
    models = state["model0"] if len(chunks) == 1 else state
    state["optimizer"] = optimizer.sharded_state_dict(
        models, is_loading=is_loading, metadata=metadata
    )
    return state


def train_and_save(case: Case, folder: str, sharding: str | None, steps: int) -> Any:
    """Losses before and after a checkpoint was written."""
    with megatron_ready(case):
        chunks = make_chunks(case)
        optimizer = make_optimizer(case, chunks)
        before = train(case, chunks, optimizer, range(steps))
        save(folder, chunks, optimizer, sharding)
        return collect(before + train(case, chunks, optimizer, range(steps, 2 * steps)))


def resume(case: Case, folder: str, sharding: str | None, steps: int) -> Any:
    """Losses after the checkpoint."""
    with megatron_ready(case):
        chunks = make_chunks(case)
        for chunk in chunks:
            for param in chunk.parameters():
                param.data.mul_(0.5)
        optimizer = make_optimizer(case, chunks)
        load(folder, chunks, optimizer, sharding)
        return collect(train(case, chunks, optimizer, range(steps, 2 * steps)))
