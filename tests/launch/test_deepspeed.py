"""The main job and the step benchmark on DeepSpeed, with two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashns_dist.testing.pool import RankPool
from launch.bench import deepspeed_step
from launch.record import read_record
from launch.settings import read_settings
from launch.train import TrainingRun, main
from launch.world import joined_world
from tests.integrations.deepspeed_training import deepspeed_ready

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")

STEPS = 6
SMALL = (
    "--dim 24 --layers 3 --heads 2 --kv-heads 2 --hidden-dim 40 --seq-len 16 --batch-size 24 "
    f"--steps {STEPS} --warmup 2 --eval-every 3 --eval-batches 1 --dtype float32"
).split()
TOLERANCE = 2e-4  # as in test_train.py


def train(arguments: list[str]) -> None:
    with deepspeed_ready():
        main(arguments)


def refuse(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(arguments)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_record(run / "log.jsonl") if "loss" in line]


def write_config(folder: Path, **settings: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **settings}))
    return str(path)


def test_the_main_job_trains_alike_on_deepspeed_and_resumes(
    ranks: RankPool, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"%d bottles of beer\n" % i for i in range(2000)))
    common = [*SMALL, "--data", str(text), "--runs", str(tmp_path), "--name"]
    ranks.run(2, train, [*common, "torch"])
    zero = ["--engine", "deepspeed", "--accumulate", "2"]
    ranks.run(2, train, [*common, "zero", *zero, "--stop-after", str(STEPS // 2)])
    resume = ["--resume", str(tmp_path / "zero"), "--runs", str(tmp_path)]
    adamw = write_config(tmp_path, optimizer={"type": "AdamW", "params": {"torch_adam": True}})
    stage3 = str(tmp_path / "stage3.json")
    Path(stage3).write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    for extra, message in [
        (["--engine", "torch"], "Resume with --engine deepspeed"),
        (["--optimizer", "adamw"], "Resume with --optimizer flashmuon"),
        (["--deepspeed-config", adamw], "flashmuon, and this run has adamw"),
        (["--deepspeed-config", stage3], r"ZeroOptimizer wrote .* \w+_Stage3 cannot read"),
    ]:
        ranks.run(2, refuse, [*resume, *extra], message)
    ranks.run(2, train, resume)
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "torch"), abs=TOLERANCE)


def test_adamw_decays_the_same_parameters_on_deepspeed(ranks: RankPool, tmp_path: Path) -> None:
    """Norms do not, on either engine."""
    adamw = ["--optimizer", "adamw", "--weight-decay", "5"]
    for name, extra in [("torch", []), ("zero", ["--engine", "deepspeed"])]:
        arguments = [*SMALL, *adamw, *extra, "--runs", str(tmp_path), "--name", name]
        ranks.run(2, train, arguments)
    assert losses(tmp_path / "zero") == pytest.approx(losses(tmp_path / "torch"), abs=TOLERANCE)


def check_orthogonalization(arguments: list[str], method: str, dtype: torch.dtype | None) -> None:
    settings = read_settings(arguments)
    with deepspeed_ready(), joined_world(None, None) as world:
        groups = TrainingRun(settings, world).engine.engine.optimizer.param_groups
    assert {group["method"] for group in groups} == {method}
    assert {group["ns_dtype"] for group in groups} == {dtype}


def test_how_to_orthogonalize_reaches_flashmuon(ranks: RankPool, tmp_path: Path) -> None:
    arguments = [*SMALL, "--runs", str(tmp_path), "--engine", "deepspeed", "--name"]
    ranks.run(2, check_orthogonalization, [*arguments, "default"], "auto", None)
    given = [*arguments, "given", "--method", "gram", "--ns-dtype", "bfloat16"]
    ranks.run(2, check_orthogonalization, given, "gram", torch.bfloat16)


def test_a_scheduler_in_the_config_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    """Its first learning rate, often 0, would have been that of the whole run."""
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02}}
    path = write_config(tmp_path, scheduler=warmup)
    arguments = [*SMALL, "--runs", str(tmp_path), "--name", "run"]
    arguments += ["--engine", "deepspeed", "--deepspeed-config", path]
    ranks.run(2, refuse, arguments, "it has a scheduler")


def measure(arguments: list[str]) -> None:
    sys.argv = ["deepspeed_step.py", *arguments]
    with deepspeed_ready():
        deepspeed_step.main()


def test_the_step_benchmark_measures_every_case(ranks: RankPool, tmp_path: Path) -> None:
    small = "--size tiny --seq-len 8 --micro-batch 1 --accumulate 2 --warmup 1 --steps 1 --rounds 1"
    cases = ["--stages", "1,3", "--optimizers", "FlashMuon,torch AdamW"]
    ranks.run(2, measure, ["--out", str(tmp_path), *small.split(), *cases])
    lines = [json.loads(line) for line in (tmp_path / "deepspeed_step.jsonl").open()]
    found = [(line["stage"], line["optimizer"]) for line in lines]
    assert found == [(stage, name) for stage in (1, 3) for name in ("FlashMuon", "torch AdamW")]
    for line in lines:
        assert "error" not in line, line["error"]
        assert 0 < line["update_seconds"] < line["step_seconds"]
        assert line["ranks"] == 2
