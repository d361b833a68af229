"""The command line of the main job: what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.data import _expand
from launch.model import ModelConfig, Transformer
from launch.optimizers import parameter_table
from launch.settings import optimizer_name, optimizer_params, read_settings


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        read_settings(arguments)
    return capsys.readouterr().err.rpartition("error: ")[2].strip()


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("--clip", "-1.0", "at least 0"),
        ("--stop-after", "0", "at least 1"),
        ("--checkpoint-every", "-5", "at least 0"),
        ("--warmup", "-1", "at least 0"),
        ("--lr", "-0.02", "at least 0"),
        ("--lr", "nan", "at least 0"),
        ("--aux-lr", "-0.1", "at least 0"),
        ("--weight-decay", "-0.1", "at least 0"),
        ("--momentum", "1.5", "from 0 to 1"),
        ("--cooldown", "1.5", "from 0 to 1"),
        ("--threads", "0", "at least 1"),
        ("--steps", "0", "at least 1"),
        ("--heads", "0", "at least 1"),
    ],
)
def test_a_number_without_sense_is_refused(option, value, limit, capsys):
    assert refused([option, value], capsys) == f"{option} {value}: it must be {limit}"


def test_the_limits_themselves_are_taken():
    text = "--clip 0 --stop-after 1 --checkpoint-every 0 --warmup 0 --lr 0 --cooldown 1 --threads 1"
    settings = read_settings(text.split())
    assert (settings.clip, settings.warmup, settings.cooldown) == (0, 0, 1)
    assert read_settings(["--cooldown", "0"]).lr is None


def deepspeed(folder: Path, **config: Any) -> list[str]:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return ["--engine", "deepspeed", "--deepspeed-config", str(path)]


@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--optimizer", "flashmuon", "optimizer"),
        ("--method", "gram", "optimizer"),
        ("--ns-dtype", "float32", "optimizer"),
        ("--lr", "0.02", "optimizer"),
        ("--aux-lr", "0.01", "optimizer"),
        ("--weight-decay", "0.1", "optimizer"),
        ("--momentum", "0.95", "optimizer"),
        ("--clip", "1.0", "gradient_clipping"),
        ("--dtype", "float32", "bf16"),
        ("--dtype", "bfloat16", "fp16"),
        ("--dtype", "bfloat16", "torch_autocast"),
    ],
)
def test_an_option_that_the_deepspeed_config_decides_is_refused(
    option, value, key, tmp_path, capsys
):
    """Even where it is the default's value: whoever gives an option expects it to count."""
    arguments = deepspeed(tmp_path, **{key: {}})
    read_settings(arguments)
    message = refused([*arguments, option, value], capsys)
    assert message.startswith(f'{option} {value}: the "{key}" of --deepspeed-config {tmp_path}')
    read_settings([*deepspeed(tmp_path, steps_per_print=1), option, value])


def test_a_resumed_runs_settings_do_not_count_as_given(tmp_path, capsys):
    """Its config may have got an optimizer since, or an older train.py ignored the options."""
    arguments = deepspeed(tmp_path, optimizer={"type": "AdamW"}, gradient_clipping=2.0)
    saved = vars(read_settings(arguments)) | {"lr": 0.5, "clip": 3.0, "compile": True}
    (tmp_path / "settings.json").write_text(json.dumps(saved, default=str))
    resumed = read_settings(["--resume", str(tmp_path)])
    assert (resumed.engine, resumed.lr) == ("deepspeed", 0.5)
    assert "--lr 0.1: " in refused(["--resume", str(tmp_path), "--lr", "0.1"], capsys)


def test_a_run_resumes_from_another_directory(tmp_path, monkeypatch):
    """Also where the first one's name has a character of patterns."""
    first, second = tmp_path / "first [1]", tmp_path / "second"
    for folder in (first / "texts", second):
        folder.mkdir(parents=True)
    for name in ("a.txt", "b.txt", "texts/c.txt"):
        (first / name).write_text(name)
    (first / "zero.json").write_text('{"gradient_clipping": 2.0}')
    monkeypatch.chdir(first)
    data = ["--data", "a.txt", "texts", "../first [[]1]/b.*", str(first / "b.txt"), "~"]
    deepspeed_arguments = ["--engine", "deepspeed", "--deepspeed-config", "zero.json"]
    saved = vars(read_settings([*data, *deepspeed_arguments]))
    (first / "settings.json").write_text(json.dumps(saved, default=str))
    monkeypatch.chdir(second)
    resumed = read_settings(["--resume", "../first [1]"])
    assert resumed.data[-1] == "~"
    found = [path.resolve() for path in _expand(resumed.data[:-1])]
    assert sorted(set(found)) == [first / "a.txt", first / "b.txt", first / "texts" / "c.txt"]
    assert resumed.deepspeed_config.read_text() == '{"gradient_clipping": 2.0}'
    (second / "d.txt").write_text("d")
    other = read_settings(["--resume", "../first [1]", "--data", "d.txt"])
    assert _expand(other.data) == [second / "d.txt"]


def test_options_that_mean_nothing_with_the_engine_are_refused(tmp_path, capsys):
    message = refused(["--engine", "deepspeed", "--compile"], capsys)
    assert message.startswith("--compile: --engine deepspeed does not")
    path = tmp_path / "config.json"
    for engine in ([], ["--engine", "torch"]):
        message = refused([*engine, "--deepspeed-config", str(path)], capsys)
        assert message.startswith(f"--deepspeed-config {path}: --engine torch does not read it")
    arguments = ["--engine", "deepspeed", "--deepspeed-config", str(path)]
    assert "No such file" in refused(arguments, capsys)
    path.write_text("{")
    assert refused(arguments, capsys).startswith(f"--deepspeed-config {path}: Expecting")


def test_the_optimizers_name_is_that_of_the_deepspeed_config(tmp_path):
    """Reports and checkpoints say what trains."""
    section = {"type": "OneBitAdam", "params": {}}
    assert optimizer_name(read_settings(deepspeed(tmp_path, optimizer=section))) == "onebitadam"
    assert optimizer_name(read_settings(deepspeed(tmp_path))) == "flashmuon"
    assert optimizer_name(read_settings(["--optimizer", "adamw"])) == "adamw"


def test_the_table_of_parameters_has_the_overrides_and_views_of_the_deepspeed_config(tmp_path):
    params = {
        "overrides": {"*.wq.weight": "adamw"},
        "matrix_views": {"*.wk.weight": {"Equal": {"count": 2}}},
    }
    section = {"type": "FlashMuon", "params": params}
    settings = read_settings(deepspeed(tmp_path, optimizer=section))
    model = Transformer(ModelConfig(vocab_size=32, dim=24, hidden_dim=40))
    lines = parameter_table(model, optimizer_params(settings)).splitlines()
    rules = {line.split()[1]: line.split()[0] for line in lines if "attention.w" in line}
    assert rules["blocks.*.attention.wq.weight"] == "adamw"
    assert rules["blocks.*.attention.wv.weight"] == "muon"
    assert any("attention.wk.weight" in line and "Equal(" in line for line in lines)
    bare = read_settings(deepspeed(tmp_path, optimizer={"type": "FlashMuon"}))
    assert parameter_table(model, optimizer_params(bare)) == parameter_table(model)
