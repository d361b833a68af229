"""Comparisons of optimizers: every contestant runs, and the table says what the runs say."""

import json
from pathlib import Path

import pytest
import torch

from flashns_dist.optim.rules import MATRIX_RULES
from launch.bench import digits, outcome, training
from launch.bench.comparison import contestants
from launch.bench.digits import Network
from launch.bench.outcome import TUNING_SEED, best_lr, reach, results, table


def run(name, lr, seed, losses, seconds=1.0):
    curve = [
        {"step": 10 * i, "seconds": seconds * i, "optimizer_seconds": 0.1 * i, "loss": loss}
        for i, loss in enumerate(losses)
    ]
    return {"task": "t", "name": name, "lr": lr, "seed": seed, "curve": curve}


RUNS = [
    run("adamw", 0.1, TUNING_SEED, [5.0, 4.0, 3.0]),
    run("adamw", 0.2, TUNING_SEED, [5.0, 4.0, float("nan")]),
    run("adamw", 0.1, 0, [5.0, 4.0, 2.9]),
    run("adamw", 0.1, 1, [5.0, 4.0, 3.1]),
    run("muon", 0.1, TUNING_SEED, [5.0, 3.5, 2.5]),
    run("muon", 0.2, TUNING_SEED, [5.0, 3.0, 2.0]),
    run("muon", 0.4, TUNING_SEED, [5.0, 3.5, 2.1]),
    run("muon", 0.2, 0, [5.0, 3.0, 2.0], seconds=3.0),
    run("muon", 0.2, 1, [5.0, 3.0, 2.2], seconds=3.0),
    run("untried", 0.2, TUNING_SEED, [5.0, 3.0, 2.2]),
]


def test_the_rate_is_that_of_the_tuning_seeds_lowest_loss():
    assert best_lr(RUNS, "adamw") == 0.1
    assert best_lr(RUNS, "muon") == 0.2


def test_results_are_of_the_chosen_rate_and_the_other_seeds():
    adamw, muon = results(RUNS)
    assert (adamw.name, adamw.lr, adamw.at_edge) == ("adamw", 0.1, True)
    assert (muon.name, muon.lr, muon.at_edge) == ("muon", 0.2, False)
    assert adamw.mean == pytest.approx(3.0)
    assert muon.deviation == pytest.approx(0.1 * 2**0.5)
    assert muon.step_seconds == pytest.approx(6.0 / 20)


def test_steps_and_time_are_those_to_the_baselines_loss():
    adamw, muon = results(RUNS)
    assert reach(muon.curve, adamw.mean) == (10.0, 3.0)
    assert reach(adamw.curve, 3.5) == (15.0, 1.5)
    assert reach(adamw.curve, 2.0) is None
    lines = table([adamw, muon]).splitlines()
    assert lines[2] == "| muon | 0.2 | 2.1000 ± 0.1414 | 0.50 | 1.50 | 300.0 | 10.0 |"
    assert lines[3].startswith("| adamw | 0.1 (edge) | 3.0000 ± 0.1414 | 1.00 | 1.00 |")


@pytest.mark.parametrize("bench", [training, digits], ids=["text", "digits"])
def test_a_comparison_writes_its_runs_once(bench, tmp_path: Path, capsys):
    if bench is digits:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    names = ["adamw", "muon-standard", *(rule for rule in MATRIX_RULES if rule != "muon")]
    arguments = ["--size", "test", "--only", ",".join(names), "--seeds", "1"]
    bench.main([*arguments, "--out", str(tmp_path / "c")])
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    assert len(lines) == 3 * len(names)
    found = [json.loads(line) for line in lines]
    assert {line["name"] for line in found} == set(names)
    for line in found:
        assert [point["step"] for point in line["curve"]] == [0, 1, 2, 3, 4]
        assert line["curve"][-1]["loss"] < line["curve"][0]["loss"] + 0.1
        assert line["curve"][-1]["seconds"] > line["curve"][-1]["optimizer_seconds"] > 0
        assert line["versions"]["torch"] == torch.__version__
    assert (tmp_path / "c.png").stat().st_size > 10_000
    assert (tmp_path / "c.md").read_text().count("\n| ") == len(names) + 2
    bench.main([*arguments, "--out", str(tmp_path / "c")])
    assert (tmp_path / "c.jsonl").read_text().splitlines() == lines
    assert "lr" in capsys.readouterr().out


def test_files_of_one_task_are_joined(tmp_path: Path):
    for name, runs in (("a", RUNS[:4]), ("b", RUNS[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(run)}\n" for run in runs))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    outcome.main([*files, "--out", str(tmp_path / "c")])
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == len(RUNS)
    assert table(results(RUNS)) in (tmp_path / "c.md").read_text()
    (tmp_path / "b.jsonl").write_text(json.dumps({**RUNS[0], "task": "other"}))
    with pytest.raises(SystemExit, match="of one"):
        outcome.main([*files, "--out", str(tmp_path / "c")])


def test_unknown_contestants_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--only \['sgd'\]: choose from adamw, torch-muon"):
        training.main(["--size", "test", "--only", "sgd", "--out", str(tmp_path / "c")])


def test_convolutions_but_the_first_are_orthogonalized():
    model = Network(4)
    (optimizer,) = contestants()["muon-standard"](model, 0.01, digits.Digits.overrides)
    names = optimizer.param_groups[0]["param_names"]
    assert names == ["second.0.weight", "third.0.weight", "fourth.0.weight"]
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[1]["lr"] == 0.01
