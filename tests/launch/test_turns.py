"""Versions of the kernels in turn: what is measured, and of which code."""

import json
import shutil
from pathlib import Path

import pytest

from launch.bench import turns

ROOT = Path(__file__).parents[2]


def test_versions_take_turns_and_differences_show(tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(ROOT / "flashns_dist", other / "flashns_dist")
    entry = other / "flashns_dist" / "orthogonalize" / "__init__.py"
    entry.write_text(
        entry.read_text()
        + "\n_exact = orthogonalize\n\n\ndef orthogonalize(x):\n    return 2 * _exact(x)\n"
    )
    command = ["turns", "--trees", f"this={ROOT}", f"again={ROOT}", f"other={other}"]
    command += ["--shapes", "2x16x24", "--seconds", "0.001", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "turns.jsonl")])
    turns.main()
    lines = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    assert lines[0]["question"] == "bmm in turn"
    names = [(line["version"], line["kind"]) for line in lines[1:]]
    assert sorted(names) == [(v, k) for v in ("again", "other", "this") for k in ("eager", "graph")]
    for line in lines[1:]:
        assert line["of_bmm"] > 0
        assert line["seconds"]["repeats"] == 2
    (difference,) = [line for line in capsys.readouterr().out.splitlines() if "differ" in line]
    bits = json.loads(difference.partition("differ: ")[2].replace("'", '"'))
    assert bits["this"] == bits["again"] != bits["other"]


def test_a_tree_without_the_package_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"version old: .* has no flashns_dist"):
        turns.Version("old", tmp_path)
