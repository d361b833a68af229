"""The log, the schedule and the summary that is computed from the log."""

import json
from pathlib import Path

import pytest

from launch.record import Record, read_record
from launch.report import RunFacts, plot_losses, summarize
from launch.schedule import learning_rate_factor

FACTS = RunFacts(
    optimizer="flashmuon",
    mesh="fsdp=2",
    device="2 processes, cpu",
    data="text",
    model="1 M parameters",
    unigram_entropy=3.0,
    tokens_per_step=100,
)


@pytest.fixture
def log(tmp_path) -> Path:
    record = Record(tmp_path / "log.jsonl")
    record.add(step=0, validation_loss=5.5)
    for step in range(21):
        seconds = 10.0 if step == 0 else 0.5
        record.add(step=step, loss=5.0 - 0.2 * step, seconds=seconds, optimizer_seconds=0.1)
    record.add(step=21, validation_loss=1.5)
    return tmp_path / "log.jsonl"


def test_summary_states_what_the_log_says(log):
    text = summarize(log, FACTS, {"log": log})
    rows = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition("  ")
        rows[name] = value.strip()
    # The last ten losses are 2.8, 2.6 … 1.0.
    assert rows["final loss"].startswith("1.900 (mean of the last 10 steps), -1.100")
    assert rows["first loss"] == "5.000"
    assert rows["validation loss"] == "1.500"
    # Twenty steps of 100 tokens in half a second each, without the slow first one.
    assert rows["tokens/s"].startswith("200 ")
    assert rows["optimizer share"].startswith("20.0%")
    assert rows["steps"] == "21 of 100 tokens, 2,100 tokens in 20 s"
    assert rows["→ log"] == str(log)


def test_steps_of_other_batches_count_as_what_they_were(tmp_path):
    """Before a resume, two steps of 400 tokens."""
    path = tmp_path / "log.jsonl"
    record = Record(path)
    for step, tokens in enumerate((0, 400, 800, 900)):
        record.add(step=step, tokens=tokens, loss=5.0, seconds=0.5, optimizer_seconds=0.1)
    text = summarize(path, FACTS, {"log": path})
    assert "4, 1,000 tokens in 2 s" in text
    assert " 400 (first step" in text  # 600 tokens in the other 1.5 seconds


def test_losses_of_a_single_step_can_be_drawn(tmp_path):
    Record(tmp_path / "log.jsonl").add(step=0, loss=5.0, seconds=1.0, optimizer_seconds=0.1)
    plot_losses(tmp_path / "log.jsonl", FACTS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_reopened_log_forgets_the_steps_that_are_done_again(log):
    Record(log, first_step=5).add(step=5, loss=0.0)
    steps = [line["step"] for line in read_record(log) if "loss" in line]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert json.loads(log.read_text().splitlines()[0]) == {"step": 0, "validation_loss": 5.5}


def test_learning_rate_rises_stays_and_falls():
    def factor(step):
        return learning_rate_factor(step, num_steps=100, warmup=10, cooldown=0.4)

    assert [factor(step) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    assert factor(80) == pytest.approx(0.5)
    assert factor(99) == pytest.approx(1 / 40)
    assert learning_rate_factor(0, num_steps=1, warmup=0, cooldown=0.0) == 1.0
