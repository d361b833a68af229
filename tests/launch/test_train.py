"""The main job, end to end: the same losses on every mesh, and across a resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from launch.checkpoint import describe_checkpoint, find_checkpoint
from launch.model import ModelConfig
from launch.record import read_record
from launch.train import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = 10
HALF = 5

# A model whose shards are uneven (3 layers' matrices of 24 and 40 rows) and that divides by tp=2.
SMALL = (
    "--dim 24 --layers 3 --heads 2 --kv-heads 2 --hidden-dim 40 --seq-len 16 --batch-size 24 "
    f"--steps {STEPS} --warmup 2 --eval-every 5 --eval-batches 1 --dtype float32"
).split()

# As the pool of ranks chooses, so that one process computes as two do.
DEVICE = "cuda" if torch.cuda.device_count() >= 2 else "cpu"

# fp32 gradients summed in another order, carried through ten steps.
TOLERANCE = 2e-4


def train(arguments: list[str]) -> None:
    """Body for the ranks; exceptions reach the test."""
    # DTensor caches by the shape of the mesh, and the process groups of the last job are gone.
    _clear_sharding_prop_cache()
    main(arguments)


def losses(run: Path) -> list[float]:
    lines = [line for line in read_record(run / "log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(lines[0]["step"], STEPS))
    return [line["loss"] for line in lines]


def validation(run: Path) -> dict[int, float]:
    lines = read_record(run / "log.jsonl")
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


class Launcher:
    """Runs the main job in this process or on the pool of ranks."""

    def __init__(self, folder: Path, ranks) -> None:
        self.folder = folder
        self.ranks = ranks
        self.text = folder / "text.txt"
        self.text.write_bytes(b"".join(b"%d bottles of beer\n" % i for i in range(2000)))

    def run(self, name: str, *extra: str, world_size: int = 0) -> Path:
        """Train; no process group at all with ``world_size=0``."""
        arguments = [*SMALL, "--data", str(self.text), "--runs", str(self.folder), "--name", name]
        self._start([*arguments, "--device", DEVICE, *extra], world_size)
        return self.folder / name

    def resume(
        self, source: Path, *extra: str, world_size: int = 0, name: str | None = None
    ) -> Path:
        arguments = ["--resume", str(source), "--runs", str(self.folder), "--device", DEVICE]
        if name is not None:
            arguments += ["--name", name]
        self._start([*arguments, *extra], world_size)
        return self.folder / name if name else source

    def _start(self, arguments: list[str], world_size: int) -> None:
        if world_size:
            self.ranks.run(world_size, train, arguments)
        else:
            train(arguments)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, ranks):
    return Launcher(tmp_path_factory.mktemp("runs"), ranks)


@pytest.fixture(scope="module")
def single(launcher):
    """One process without a process group, with checkpoints at half time and at the end."""
    return launcher.run("single", "--checkpoint-every", str(HALF))


@pytest.fixture(scope="module")
def sharded(launcher):
    """Two processes with FSDP2, with checkpoints at half time and at the end."""
    return launcher.run("sharded", "--checkpoint-every", str(HALF), world_size=2)


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def assert_close(actual: list[float], expected: list[float], tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=tolerance, atol=0)


def test_run_learns_and_leaves_its_files(single):
    curve = losses(single)
    assert curve[-1] < curve[0] - 0.5
    assert sorted(path.name for path in single.iterdir()) == [
        "checkpoints",
        "log.jsonl",
        "loss.png",
        "settings.json",
        "summary.txt",
    ]
    assert (single / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = (single / "summary.txt").read_text()
    assert len(summary.splitlines()) < 24
    for word in ("unigram entropy", "final loss", "tokens/s", "optimizer share", "loss.png"):
        assert word in summary
    assert sorted(validation(single)) == [0, HALF, STEPS]
    step = read_record(single / "log.jsonl")[-2]
    assert 0 < step["optimizer_seconds"] < step["seconds"]
    assert step["grad_norm"] > 0


@pytest.mark.parametrize("mesh", ["fsdp", "ddp", "tp=2", "replicate=2"])
def test_two_processes_agree_with_one(launcher, single, mesh):
    run = launcher.run(f"two-{mesh}", "--mesh", mesh, world_size=2)
    assert_close(losses(run), losses(single))
    assert validation(run) == pytest.approx(validation(single), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["replicate=2,fsdp=2", "fsdp=2,tp=2"])
def test_four_processes_agree_with_one(launcher, single, mesh):
    run = launcher.run(f"four-{mesh}", "--mesh", mesh, world_size=4)
    assert_close(losses(run), losses(single))


@pytest.mark.parametrize(("world_size", "mesh"), [(0, None), (2, "fsdp"), (2, "ddp")])
def test_accumulated_parts_agree_with_the_whole_batch(launcher, single, world_size, mesh):
    extra = ["--accumulate", "4", *(["--mesh", mesh] if mesh else [])]
    run = launcher.run(f"parts-{mesh}", *extra, world_size=world_size)
    assert_close(losses(run), losses(single))


@pytest.mark.parametrize("optimizer", ["torch-muon", "adamw"])
def test_the_other_optimizers_agree_across_processes_too(launcher, optimizer):
    one = launcher.run(f"{optimizer}-1", "--optimizer", optimizer)
    two = launcher.run(f"{optimizer}-2", "--optimizer", optimizer, "--mesh", "ddp", world_size=2)
    # torch.optim.Muon orthogonalizes in bf16, which turns rounding into visible differences.
    assert_close(losses(two), losses(one), 5e-3 if optimizer == "torch-muon" else TOLERANCE)
    assert losses(one)[-1] < losses(one)[0]


def test_resume_equals_the_uninterrupted_run(launcher, sharded):
    resumed = launcher.resume(checkpoint(sharded, HALF), name="resumed", world_size=2)
    assert losses(resumed) == losses(sharded)[HALF:]
    assert validation(resumed)[STEPS] == validation(sharded)[STEPS]


def test_resume_continues_an_interrupted_run_in_its_folder(launcher, single):
    # Interrupted after step 7 with a checkpoint at 5 alone: steps 5 and 6 are done again.
    run = launcher.run("interrupted", "--checkpoint-every", str(HALF), "--stop-after", "7")
    for path in checkpoint(run, 7).iterdir():
        path.unlink()
    assert launcher.resume(run) == run
    assert losses(run) == losses(single)
    assert validation(run) == validation(single)


def test_resume_of_an_earlier_checkpoint_needs_a_folder_of_its_own(launcher, single):
    """Else the next --resume would take the old run's last checkpoint for the new one's."""
    before = (single / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"goes on to step-0000{STEPS}.* another --name"):
        launcher.resume(checkpoint(single, HALF))
    assert (single / "log.jsonl").read_bytes() == before
    run = Path(shutil.copytree(single, launcher.folder / "without-later-ones"))
    shutil.rmtree(checkpoint(run, STEPS))
    launcher.resume(checkpoint(run, HALF), name=None)
    assert losses(run) == losses(single)


def test_resume_takes_a_checkpoint_from_inside_its_folder(launcher, single, monkeypatch):
    run = Path(shutil.copytree(single, launcher.folder / "from-inside"))
    shutil.rmtree(checkpoint(run, STEPS))
    monkeypatch.chdir(run / "checkpoints")
    launcher.resume(Path(f"step-{HALF:06d}"))
    assert losses(run) == losses(single)


def test_the_last_checkpoint_is_that_of_the_most_steps(tmp_path):
    for step in (999_999, 1_000_000, 1_000_001):
        path = checkpoint(tmp_path, step)
        describe_checkpoint(path, step, ModelConfig(), tokens=0, engine="torch", optimizer="adamw")
        (path / ".metadata").touch()
    (checkpoint(tmp_path, 1_000_001) / ".metadata").unlink()  # cut short
    assert find_checkpoint(tmp_path) == checkpoint(tmp_path, 1_000_000)


@pytest.mark.parametrize(
    ("source", "world_size", "mesh"),
    [
        ("sharded", 0, None),
        ("sharded", 2, "tp=2"),
        ("sharded", 3, "fsdp"),
        ("single", 2, "fsdp"),
        ("single", 2, "ddp"),
        pytest.param("single", 4, "fsdp=2,tp=2", marks=pytest.mark.slow),
    ],
)
def test_resume_on_another_mesh_continues_the_same_curve(
    launcher, request, source, world_size, mesh
):
    run = request.getfixturevalue(source)
    name = f"{source}-to-{world_size}-{mesh}"
    extra = ["--mesh", mesh] if mesh else []
    resumed = launcher.resume(checkpoint(run, HALF), *extra, name=name, world_size=world_size)
    assert_close(losses(resumed), losses(run)[HALF:])


def test_tensor_parallel_checkpoint_resumes_without_it(launcher, single):
    run = launcher.run("tp", "--mesh", "tp=2", "--checkpoint-every", str(HALF), world_size=2)
    resumed = launcher.resume(checkpoint(run, HALF), name="tp-to-one")
    assert_close(losses(resumed), losses(single)[HALF:])


def test_resume_keeps_the_settings_of_the_run(launcher, single):
    resumed = launcher.resume(checkpoint(single, HALF), "--lr", "0.5", name="other-lr")
    settings = json.loads((resumed / "settings.json").read_text())
    assert settings["dim"] == 24
    assert settings["lr"] == 0.5
    assert losses(resumed)[0] == losses(single)[HALF]
    assert losses(resumed)[1:] != losses(single)[HALF + 1 :]


def test_a_resumed_run_may_have_another_weight_decay(launcher, single):
    resumed = launcher.resume(checkpoint(single, HALF), "--weight-decay", "5", name="other-decay")
    assert losses(resumed)[0] == losses(single)[HALF]
    assert losses(resumed)[1:] != losses(single)[HALF + 1 :]


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (["--batch-size", "25", "--accumulate", "2"], ValueError, "not a multiple of 2"),
        (["--mesh", "fsdp=2"], ValueError, "no process group"),
        (["--name", "single"], FileExistsError, "--resume"),
        (["--heads", "5"], ValueError, "not a multiple of num_heads"),
        (["--seq-len", "100000"], ValueError, "smaller --seq-len"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(launcher, single, extra, error, message):
    with pytest.raises(error, match=message):
        launcher.run("refused", *extra)
    assert not (launcher.folder / "refused").exists()


@pytest.mark.parametrize(
    ("step", "extra", "message"),
    [
        (STEPS, [], f"step-0000{STEPS} is at step {STEPS}, and --steps {STEPS} ends the run"),
        (STEPS, ["--steps", "8"], "--steps 8 ends the run there or before. Give a larger --steps"),
        (HALF, ["--stop-after", str(HALF)], f"step {HALF}, and --stop-after {HALF} ends the run"),
    ],
)
def test_resume_of_a_run_without_steps_left_changes_nothing(launcher, single, step, extra, message):
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in launcher.folder.rglob("*") if path.is_file()}

    before = files()
    source = single if step == STEPS else checkpoint(single, step)
    for name in (None, "nothing-left"):
        with pytest.raises(ValueError, match=message):
            launcher.resume(source, *extra, name=name)
    assert files() == before
    assert not (launcher.folder / "nothing-left").exists()


def test_resume_of_a_finished_run_goes_on_with_more_steps(launcher, single):
    resumed = launcher.resume(single, "--steps", str(STEPS + 2), name="longer")
    lines = read_record(resumed / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [STEPS, STEPS + 1]


def test_tokens_are_those_of_the_batches_that_there_were(launcher, single):
    """Of 24 sequences of 16 tokens, then of 12, then of 24 again."""
    run = launcher.resume(checkpoint(single, HALF), "--batch-size", "12", name="smaller")
    launcher.resume(run, "--batch-size", "24", "--steps", str(STEPS + 1))
    lines = [line for line in read_record(run / "log.jsonl") if "loss" in line]
    half, end = HALF * 384, HALF * 384 + (STEPS - HALF) * 192
    assert [line["tokens"] for line in lines] == [*range(half, end, 192), end]
    assert read_record(run / "log.jsonl")[-1]["tokens"] == end + 384  # the validation
    steps = f"{STEPS - HALF + 1}, {(STEPS - HALF) * 192 + 384:,} tokens in"
    assert steps in (run / "summary.txt").read_text()


def test_resume_of_another_model_is_refused(launcher, single):
    with pytest.raises(ValueError, match="num_layers=3, and this run has 2"):
        launcher.resume(checkpoint(single, HALF), "--layers", "2", name="other-model")
    with pytest.raises(SystemExit, match=r"no settings\.json"):
        launcher.resume(launcher.folder / "missing", name="missing")


def test_resume_with_another_engine_or_optimizer_is_refused(launcher, single):
    for extra, message in [
        (["--engine", "deepspeed"], "of --engine torch, .* Resume with --engine torch"),
        (["--optimizer", "adamw"], "flashmuon, and this run has adamw. Resume with --optimizer f"),
    ]:
        with pytest.raises(ValueError, match=message):
            launcher.resume(checkpoint(single, HALF), *extra, name="another")
    assert not (launcher.folder / "another").exists()


def test_a_checkpoint_that_names_no_engine_and_optimizer_resumes(launcher, single, tmp_path):
    """As older ones do not."""
    run = shutil.copytree(single, tmp_path / "old")
    path = checkpoint(run, HALF) / "run.json"
    described = json.loads(path.read_text())
    assert (described.pop("engine"), described.pop("optimizer")) == ("torch", "flashmuon")
    assert described.pop("tokens") == HALF * 384
    path.write_text(json.dumps(described))
    resumed = launcher.resume(checkpoint(run, HALF), name="from-old")
    assert losses(resumed) == losses(single)[HALF:]


def test_torchrun_starts_the_job_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "launch/train.py"), *SMALL, "--name", "cli"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "runs/cli")) == STEPS
    assert "unigram entropy" in done.stdout
    # Plain lines, since standard error is no terminal.
    assert f"step {STEPS}/{STEPS}" in done.stderr
    assert "\r" not in done.stderr
