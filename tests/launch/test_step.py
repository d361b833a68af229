"""The benchmark of a sharded step: it runs, says what fails, and reads traces rightly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.bench import step, trace
from launch.bench.case import parse_case

OPTIONS = [
    {},
    {"name": "share", "cases": "@", "exchange": {"replicas": "share"}},
    {"name": "wrong", "no_such_option": True},
]


def test_every_candidate_is_measured_or_says_why_not(ranks, tmp_path: Path) -> None:
    arguments = [
        *(
            "--cases",
            "tiny@2x1,tiny-experts:rows",
            "--steps",
            "2",
            "--profile",
            "tiny-experts:rows",
        ),
        *("--candidates", "FlashMuon,fused AdamW"),
        *("--device", "cpu", "--options", json.dumps(OPTIONS), "--out", str(tmp_path)),
    ]
    ranks.run(2, step.main, arguments)
    lines = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    found = {
        (line["case"], line["candidate"]): line for line in lines if line["question"] == "step"
    }
    names = ("FlashMuon", "FlashMuon share", "FlashMuon wrong", "fused AdamW")
    assert set(found) == {("tiny@2x1", name) for name in names} | {
        ("tiny-experts:rows", name) for name in names if name != "FlashMuon share"
    }
    for (_, name), line in found.items():
        if name == "FlashMuon wrong":
            assert "no_such_option" in line["error"]
            assert "seconds" not in line
            continue
        assert "error" not in line
        assert 0 < line["seconds"]["low"] <= line["seconds"]["median"]
        # fp32: the momentum, or AdamW's two; and a few step counters
        states = 2 if name == "fused AdamW" else 1
        stored = line["elements"] // line["mesh"][-1]
        assert 0 <= line["state_bytes"] - 4 * states * stored <= 8 * line["parameters"]
        if name.startswith("FlashMuon"):
            assert line["predicted_seconds"] > 0
            assert line["predicted_memory_bytes"] > 0
    (profile,) = [line for line in lines if line["question"] == "profile"]
    assert set(profile["parts"]) == set(trace.PARTS)


@pytest.mark.parametrize("name", ["no-such-model", "tiny@3x1", "tiny:columns"])
def test_an_unknown_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        parse_case(name, 2)


def kernel(name: str, begin: float, length: float, launch: int) -> dict:
    args = {"correlation": launch}
    return {"cat": "kernel", "name": name, "ts": begin, "dur": length, "args": args}


def launched(number: int, at: float) -> dict:
    return {"cat": "cuda_runtime", "tid": 1, "ts": at, "args": {"correlation": number}}


def part(name: str, begin: float, length: float) -> dict:
    return {"cat": "user_annotation", "name": f"part:{name}", "tid": 1, "ts": begin, "dur": length}


def test_kernels_belong_to_the_innermost_part_that_launched_them() -> None:
    events = [
        part("orthogonalize", 0, 100),
        part("unpack", 10, 10),
        part("a graph", 70, 10),
        *(launched(number, at) for number, at in ((1, 15), (2, 50), (3, 150), (4, 60), (5, 75))),
        kernel("elementwise", 1000, 100, 1),
        kernel("elementwise", 1100, 300, 2),
        kernel("momentum_kernel", 1700, 50, 3),  # outside of any part: by its name
        kernel("ncclDevKernel_SendRecv", 1300, 300, 4),
        kernel("update_kernel", 1710, 40, 5),  # of a graph: by its name too
    ]
    found = trace.summary(events)
    seconds = {name: value["seconds"] for name, value in found["parts"].items() if value["kernels"]}
    assert seconds == pytest.approx(
        {"unpack": 1e-4, "orthogonalize": 3e-4, "momentum": 5e-5, "wire": 3e-4, "update": 4e-5}
    )
    assert found["span"] == pytest.approx(750e-6)
    assert found["exposed_wire"] == pytest.approx(200e-6)
    assert found["idle"] == pytest.approx(100e-6)
    (gap,) = found["gaps"]
    assert gap["seconds"] == pytest.approx(300e-6)
    assert gap["wire_seconds"] == pytest.approx(200e-6)
    assert gap["after"].startswith("orthogonalize")
    assert gap["before"].startswith("momentum")
