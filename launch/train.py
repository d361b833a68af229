"""Train a decoder-only transformer with FlashMuon.

    torchrun --nproc-per-node 2 launch/train.py        two processes, FSDP2
    python launch/train.py                             one process
    torchrun --nproc-per-node 4 launch/train.py --mesh fsdp=2,tp=2
    torchrun --nproc-per-node 2 launch/train.py --engine deepspeed --deepspeed-config zero3.json
    torchrun --nproc-per-node 8 launch/train.py --size 160m --seq-len 1024 --batch-size 512 \
        --data 'fineweb10B/*.bin'

The global batch of a step depends on the seed alone, so losses agree whatever the number of
processes and the mesh. Output goes to runs/NAME/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

if __package__ in (None, ""):
    # Started as a file: the repository instead of launch/, so that siblings import as launch.*.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.checkpoint import (
    check_last,
    checkpoint_step,
    checkpoint_tokens,
    describe_checkpoint,
    find_checkpoint,
)
from launch.data import Dataset, load_dataset
from launch.deepspeed_engine import DeepSpeedEngine
from launch.engine import Batch, Engine, TorchEngine
from launch.mesh import MeshSpec, parse_mesh
from launch.model import SIZES, ModelConfig, Transformer
from launch.optimizers import parameter_table
from launch.progress import Progress
from launch.record import Record
from launch.report import RunFacts, plot_losses, summarize
from launch.schedule import learning_rate_factor
from launch.settings import optimizer_config, optimizer_name, optimizer_params, read_settings
from launch.world import World, joined_world, leave_process


class TrainingRun:
    """One run: its data, model, engine, log and files."""

    def __init__(self, settings: argparse.Namespace, world: World) -> None:
        self.settings = settings
        self.world = world
        self.optimizer_name = optimizer_name(settings)
        self.mesh = _mesh(settings, world)
        self.dataset = load_dataset(settings.data)
        self.dataset.check(settings.seq_len)
        self.model_config = _model_config(settings, self.dataset)
        self._parts = _batch_parts(settings, self.mesh, world)
        self.first_step = 0
        self.end = min(settings.stop_after or settings.steps, settings.steps)
        checkpoint = None
        if settings.resume is not None:
            checkpoint = find_checkpoint(settings.resume)
            self.first_step = checkpoint_step(
                checkpoint,
                self.model_config,
                engine=settings.engine,
                optimizer=self.optimizer_name,
            )
            self._check_steps_left(checkpoint)
        self.folder = _run_folder(settings, world)
        model = Transformer(self.model_config, seed=settings.seed)
        self.facts = self._facts(model.num_parameters())
        tokens = None if checkpoint is None else checkpoint_tokens(checkpoint)
        self.tokens = self.first_step * self.facts.tokens_per_step if tokens is None else tokens
        if world.is_first and self.optimizer_name == "flashmuon":
            table = parameter_table(model, optimizer_params(settings))
            print(table, end="\n\n", file=sys.stderr, flush=True)
        self.engine = self._engine(model)
        if checkpoint is not None:
            self.engine.load(checkpoint)
        log = self.folder / "log.jsonl" if world.is_first else None
        self.record = Record(log, first_step=self.first_step)

    def train(self) -> None:
        """Run all steps, with evaluations and checkpoints between them."""
        settings = self.settings
        if self.world.is_first:
            text = json.dumps(vars(settings) | {"resume": None}, indent=2, default=str)
            (self.folder / "settings.json").write_text(text)
        progress = Progress(settings.steps, self.first_step, shown=self.world.is_first)
        for step in range(self.first_step, self.end):
            if step % settings.eval_every == 0:
                progress.validation(self._evaluate(step))
            self._step(step, progress)
            finished = step + 1
            every = settings.checkpoint_every
            if finished == self.end or (every and finished % every == 0):
                self._save(finished)
        if self.end == settings.steps:
            self._evaluate(self.end)
        progress.close()

    def report(self) -> None:
        """Draw the losses and print the summary, on the first rank."""
        record = self.folder / "log.jsonl"
        if not self.world.is_first or not record.stat().st_size:
            return
        picture = self.folder / "loss.png"
        plot_losses(record, self.facts, picture)
        files = {
            "loss curves": picture,
            "log": record,
            "checkpoints": self.folder / "checkpoints",
            "this summary": self.folder / "summary.txt",
        }
        text = summarize(record, self.facts, files)
        files["this summary"].write_text(text + "\n")
        print(f"\n{text}", flush=True)

    def _check_steps_left(self, checkpoint: Path) -> None:
        if self.first_step >= self.end:
            option = "--stop-after" if self.end < self.settings.steps else "--steps"
            raise ValueError(
                f"--resume {self.settings.resume}: {checkpoint} is at step {self.first_step}, and "
                f"{option} {self.end} ends the run there or before. Give a larger {option}, or an "
                "earlier checkpoint."
            )

    def _engine(self, model: Transformer) -> Engine:
        settings = self.settings
        optimizer, dtype = optimizer_config(settings), _dtype(settings, self.world)
        if settings.engine == "deepspeed":
            return DeepSpeedEngine(
                model,
                world=self.world,
                optimizer=optimizer,
                dtype=dtype,
                clip=settings.clip,
                config=settings.deepspeed_config,
                micro_batch_size=self._parts[0].stop - self._parts[0].start,
                num_parts=len(self._parts),
            )
        return TorchEngine(
            model,
            world=self.world,
            mesh=self.mesh,
            optimizer=optimizer,
            dtype=dtype,
            clip=settings.clip,
            compile_blocks=settings.compile,
        )

    def _step(self, step: int, progress: Progress) -> None:
        settings = self.settings
        started = time.perf_counter()
        factor = learning_rate_factor(
            step, num_steps=settings.steps, warmup=settings.warmup, cooldown=settings.cooldown
        )
        result = self.engine.train_step(self._train_batch(step), factor)
        seconds = time.perf_counter() - started
        if not torch.isfinite(torch.tensor(result.loss)):
            raise RuntimeError(
                f"step {step}: the loss is {result.loss}. Lower --lr or --aux-lr; "
                "the last checkpoint is still good."
            )
        speed = self.facts.tokens_per_step / seconds
        self.record.add(
            step=step,
            tokens=self.tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr_factor=factor,
            seconds=seconds,
            optimizer_seconds=result.optimizer_seconds,
            tokens_per_second=speed,
        )
        self.tokens += self.facts.tokens_per_step
        progress.step(
            step,
            loss=result.loss,
            tokens_per_second=speed,
            optimizer_share=result.optimizer_seconds / seconds,
        )

    def _train_batch(self, step: int) -> list[Batch]:
        return [
            self.dataset.train_batch(
                step,
                seed=self.settings.seed,
                batch_size=self.settings.batch_size,
                seq_len=self.settings.seq_len,
                part=part,
            )
            for part in self._parts
        ]

    def _evaluate(self, step: int) -> float:
        loss = self.engine.evaluate(self._validation_batches())
        self.record.add(step=step, tokens=self.tokens, validation_loss=loss)
        return loss

    def _validation_batches(self) -> Iterator[Batch]:
        for index in range(self.settings.eval_batches):
            for part in self._parts:
                yield self.dataset.validation_batch(
                    index,
                    num_batches=self.settings.eval_batches,
                    batch_size=self.settings.batch_size,
                    seq_len=self.settings.seq_len,
                    part=part,
                )

    def _save(self, step: int) -> None:
        path = self.folder / "checkpoints" / f"step-{step:06d}"
        if self.world.is_first:
            describe_checkpoint(
                path,
                step,
                self.model_config,
                tokens=self.tokens,
                engine=self.settings.engine,
                optimizer=self.optimizer_name,
            )
        self.world.barrier()
        self.engine.save(path)

    def _facts(self, num_parameters: int) -> RunFacts:
        settings, config = self.settings, self.model_config
        noun = "process" if self.world.size == 1 else "processes"
        return RunFacts(
            optimizer=self.optimizer_name,
            mesh="DeepSpeed" if settings.engine == "deepspeed" else str(self.mesh),
            device=f"{self.world.size} {noun}, {self.world.device.type}",
            data=self.dataset.description,
            model=f"{num_parameters / 1e6:.2f} M parameters, {config.num_layers} layers"
            f" of width {config.dim}, {settings.seq_len} tokens of context",
            unigram_entropy=self.dataset.train.unigram_entropy(),
            tokens_per_step=settings.batch_size * settings.seq_len,
        )


def _mesh(settings: argparse.Namespace, world: World) -> MeshSpec:
    if settings.engine == "deepspeed" and settings.mesh is not None:
        raise ValueError(
            f"--mesh {settings.mesh} with --engine deepspeed: DeepSpeed shards over all processes, "
            "as --deepspeed-config says. Leave --mesh out."
        )
    if not world.distributed:
        if settings.mesh is not None:
            raise ValueError(
                f"--mesh {settings.mesh}: there is one process and no process group. "
                "Start with torchrun --nproc-per-node N launch/train.py."
            )
        return MeshSpec(())
    return parse_mesh(settings.mesh or "fsdp", world.size)


def _dtype(settings: argparse.Namespace, world: World) -> torch.dtype:
    default = "bfloat16" if world.device.type == "cuda" else "float32"
    return torch.bfloat16 if (settings.dtype or default) == "bfloat16" else torch.float32


def _model_config(settings: argparse.Namespace, dataset: Dataset) -> ModelConfig:
    chosen = {
        "dim": settings.dim,
        "num_layers": settings.layers,
        "num_heads": settings.heads,
        "num_kv_heads": settings.kv_heads,
        "hidden_dim": settings.hidden_dim,
        "vocab_size": dataset.vocab_size,
        "max_seq_len": settings.seq_len,
    }
    return replace(
        SIZES[settings.size], **{name: value for name, value in chosen.items() if value is not None}
    )


def _batch_parts(settings: argparse.Namespace, mesh: MeshSpec, world: World) -> list[slice]:
    """Divide the rows of the global batch: first by accumulation, then by data rank."""
    num_parts = settings.accumulate * mesh.num_data_ranks
    if settings.batch_size % num_parts:
        raise ValueError(
            f"--batch-size {settings.batch_size} is not a multiple of {num_parts}, that is "
            f"--accumulate {settings.accumulate} times {mesh.num_data_ranks} data ranks: parts of "
            "different size would weigh sequences differently. Change one of them."
        )
    rows = settings.batch_size // num_parts
    # The tp axis is the innermost: its ranks read the same rows.
    data_rank = world.rank // mesh.size("tp")
    firsts = [
        (part * mesh.num_data_ranks + data_rank) * rows for part in range(settings.accumulate)
    ]
    return [slice(first, first + rows) for first in firsts]


def _run_folder(settings: argparse.Namespace, world: World) -> Path:
    if settings.name is None and settings.resume is not None:
        resume: Path = settings.resume
        if not (resume / "run.json").is_file():
            return resume
        run = resume.absolute().parent.parent
        check_last(resume, run)
        return run
    name = settings.name or world.agree(time.strftime("%Y%m%d-%H%M%S-") + optimizer_name(settings))
    folder: Path = settings.runs / name
    exists = world.agree(str((folder / "log.jsonl").exists()))
    if exists == "True":
        raise FileExistsError(
            f"{folder} holds a run. Continue it with --resume {folder}, or give another --name."
        )
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or the given arguments instead."""
    settings = read_settings(arguments)
    # Logits from tensor parallelism are a view, and nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Without a process group, one process saves the checkpoint, as it should.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with joined_world(settings.device, settings.threads) as world:
        run = TrainingRun(settings, world)
        run.train()
        run.report()


if __name__ == "__main__":
    main()
    leave_process()
