"""Step time in megatron-core under data and tensor parallelism: FlashMuon, Adam, Megatron's Muon.

    torchrun --nproc-per-node 2 launch/bench/megatron_step.py --tensor-parallel 1,2 --out DIR

Writes ``DIR/megatron_step-N.jsonl`` for N ranks, one measurement per line with the losses of every
step, and prints a table. Everything trains the same model from the same weights on the same global
batch in one run, with gradient reduction and parameter gathering overlapped where Megatron can.
Built from megatron.core alone: TransformerEngine and apex are not needed. An optimizer that fails
writes its error. ``--device cpu`` tries the script out, at sizes of a test.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import warnings
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.bench.timing import environment
from launch.world import World, joined_world, leave_process

# hidden, layers, heads, query groups, ffn, vocabulary
SIZES = {
    "tiny": (64, 2, 4, 2, 128, 128),
    "160m": (768, 12, 12, 4, 2048, 32768),
    "700m": (2048, 12, 16, 8, 5632, 32768),
    "2b": (2560, 24, 20, 4, 6912, 32768),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "FlashMuon": {"optimizer": "flashmuon"},
    "FlashMuon, replicated": {"optimizer": "flashmuon", "use_distributed_optimizer": False},
    "Megatron Adam": {"optimizer": "adam", "lr": 3e-4},
    # Whole matrices on every rank; needs the package emerging_optimizers.
    "Megatron Muon": {"optimizer": "muon", "use_distributed_optimizer": False},
    # The same, with matrices divided among data-parallel ranks by layer.
    "Megatron layer-wise Muon": {"optimizer": "dist_muon", "use_distributed_optimizer": False},
}


def build(name: str, tensor_parallel: int, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The wrapped model and its optimizer."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_config import TransformerConfig

    hidden, layers, heads, groups, ffn, vocabulary = SIZES[arguments.size]
    half = arguments.dtype == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tensor_parallel,
        bf16=half,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=arguments.device == "cpu",
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=vocabulary,
        max_sequence_length=arguments.seq_len,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    if arguments.device == "cuda":
        model.cuda()
    fill(model, tensor_parallel)
    wrapped_model: Any = Float16Module(config, model) if half else model
    settings = dict(OPTIMIZERS[name])
    distributed = settings.pop("use_distributed_optimizer", True)
    model = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=distributed,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=distributed,
            check_for_nan_in_grad=False,
        ),
        wrapped_model,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func, config.grad_sync_func = model.no_sync, model.start_grad_sync
    return model, make_optimizer(settings, distributed, arguments, dtype, model)


def make_optimizer(
    settings: dict[str, Any],
    distributed: bool,
    arguments: argparse.Namespace,
    dtype: torch.dtype,
    model: Any,
) -> Any:
    from megatron.core import optimizer as core_optimizer

    options = {"lr": 0.02, "min_lr": 0.0, "weight_decay": 0.1, "clip_grad": 1.0, **settings}
    if hasattr(core_optimizer.OptimizerConfig, "muon_scale_mode"):
        options["muon_scale_mode"] = "shape_scaling"
    config = core_optimizer.OptimizerConfig(
        bf16=arguments.dtype == "bf16",
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        overlap_param_gather=distributed,
        **options,
    )
    if settings["optimizer"] in ("muon", "dist_muon"):
        config.muon_tp_mode = "duplicated"
        try:
            muon = importlib.import_module("megatron.core.optimizer.muon")
        except ImportError:  # 0.18 and later: one factory
            return core_optimizer.get_megatron_optimizer(config, [model])
        return muon.get_megatron_muon_optimizer(
            config,
            [model],
            use_gloo_process_groups=False,
            layer_wise_distributed_optimizer=settings["optimizer"] == "dist_muon",
        )
    return core_optimizer.get_megatron_optimizer(config, [model], use_gloo_process_groups=False)


@torch.no_grad()
def fill(model: torch.nn.Module, tensor_parallel: int) -> None:
    """Weights that depend on names only: the same on any number of tensor-parallel ranks."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, param in model.named_parameters():
        if param.ndim < 2:
            param.fill_(float(name.endswith("weight")))
            continue
        cut = tensor_parallel > 1 and getattr(param, "tensor_model_parallel", False)
        shape = list(param.shape)
        if cut:
            shape[param.partition_dim] *= tensor_parallel
        generator = torch.Generator(param.device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator, device=param.device) * 0.02
        if cut:
            parts = whole.chunk(2 if param.partition_stride == 2 else 1, param.partition_dim)
            shards = [part.chunk(tensor_parallel, param.partition_dim)[rank] for part in parts]
            whole = torch.cat(shards, param.partition_dim)
        param.copy_(whole)


def batch(step: int, arguments: argparse.Namespace) -> list[Tensor]:
    """This rank's micro-batches, of a global batch that is the same on any number of ranks."""
    from megatron.core import parallel_state

    vocabulary = SIZES[arguments.size][-1]
    generator = torch.Generator().manual_seed(step % 4)
    shape = (arguments.global_batch, arguments.seq_len + 1)
    tokens = torch.randint(0, vocabulary // 8, shape, generator=generator)
    ranks, rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    return list(tokens.chunk(ranks)[rank].to(arguments.device).split(arguments.micro_batch))


def measure(
    name: str, tensor_parallel: int, arguments: argparse.Namespace, world: World
) -> dict[str, Any]:
    """Median seconds of a step and of its ``optimizer.step()``, losses, and peak memory."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, optimizer = build(name, tensor_parallel, arguments)
    run = get_forward_backward_func()
    positions = torch.arange(arguments.seq_len, device=arguments.device)

    def forward(data: Any, chunk: Any) -> Any:
        tokens = next(data)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        values = chunk(inputs, positions.expand_as(inputs), None, labels=labels)

        def loss(output: Tensor) -> Any:
            mean = output.float().mean()
            return mean, {"loss": mean.detach().clone()}

        return values, loss

    losses, norms, steps, updates = [], [], [], []
    for step in range(arguments.warmup + arguments.steps):
        data = batch(step, arguments)
        begin = world.now()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = run(
            forward_step_func=forward,
            data_iterator=iter(data),
            model=model,
            num_microbatches=len(data),
            seq_length=arguments.seq_len,
            micro_batch_size=arguments.micro_batch,
            forward_only=False,
        )
        middle = world.now()
        _, norm, _ = optimizer.step()
        end = world.now()
        if step >= arguments.warmup:
            steps.append(end - begin)
            updates.append(end - middle)
        mean = torch.stack([entry["loss"] for entry in found]).mean()
        losses.append(world.mean(mean))
        norms.append(float(norm))
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    return {
        "step_seconds": statistics.median(steps),
        "step_seconds_range": [min(steps), max(steps)],
        "optimizer_seconds": statistics.median(updates),
        "optimizer_seconds_range": [min(updates), max(updates)],
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        "norms": norms,
    }


def attempt(
    name: str, tensor_parallel: int, arguments: argparse.Namespace, world: World
) -> dict[str, Any]:
    """A measurement, or the error that every rank got: a rank alone would hang the others."""
    try:
        return measure(name, tensor_parallel, arguments, world)
    except Exception as error:  # the table shows what does not run, too
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def measure_all(arguments: argparse.Namespace, world: World) -> list[dict[str, Any]]:
    from megatron.core import parallel_state, tensor_parallel

    results = []
    for degree in (int(text) for text in arguments.tensor_parallel.split(",")):
        parallel_state.initialize_model_parallel(degree, create_gloo_process_groups=False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        layout = f"DP{world.size // degree} x TP{degree}"
        for name in arguments.optimizers.split(";"):
            result = {"layout": layout, "optimizer": name}
            result |= attempt(name, degree, arguments, world)
            results.append(result)
            if world.is_first:
                print(json.dumps(result), flush=True)
        parallel_state.destroy_model_parallel()
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Rows of times, and of losses beside the first layout's."""
    lines = [f"{'layout':12s}{'optimizer':26s}{'step ms':>9s}{'opt ms':>9s}{'GiB':>7s}  losses"]
    first: dict[str, list[float]] = {}
    for result in results:
        head = f"{result['layout']:12s}{result['optimizer']:26s}"
        if "error" in result:
            lines.append(f"{head}  {result['error']}")
            continue
        base = first.setdefault(result["optimizer"], result["losses"])
        apart = max(abs(a - b) for a, b in zip(base, result["losses"], strict=True))
        lines.append(
            f"{head}{result['step_seconds'] * 1e3:9.1f}{result['optimizer_seconds'] * 1e3:9.1f}"
            f"{result['peak_bytes'] / 2**30:7.1f}  {result['losses'][0]:.4f} to "
            f"{result['losses'][-1]:.4f}, {apart:.1e} from the first layout's"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every layout and optimizer, and write the lines on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", choices=list(SIZES), default="700m")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--tensor-parallel", default="1,2")
    parser.add_argument("--optimizers", default=";".join(OPTIMIZERS))
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with ExitStack() as stack:
        world = stack.enter_context(joined_world(arguments.device, None))
        if arguments.device == "cpu":
            stub = importlib.import_module("tests.integrations.megatron_cpu")
            stack.enter_context(stub.megatron_on_cpu())
        core = importlib.import_module("megatron.core")
        importlib.import_module("flashns_dist.integrations.megatron").install()
        results = measure_all(arguments, world)
        if world.is_first:
            common = {
                **environment(),
                "megatron_core": core.__version__,
                "ranks": world.size,
                **{k: getattr(arguments, k) for k in ("size", "dtype", "seq_len", "global_batch")},
                "micro_batch": arguments.micro_batch,
            }
            arguments.out.mkdir(parents=True, exist_ok=True)
            path = arguments.out / f"megatron_step-{world.size}.jsonl"
            with path.open("w") as file:
                for result in results:
                    file.write(json.dumps({**result, **common}) + "\n")
            print(table(results))


if __name__ == "__main__":
    main()
    leave_process()
