"""Whether one version of the kernels is faster than another, on a GPU that is kept busy.

    git archive COMMIT flashns_dist | tar -x -C /tmp/old
    python -m launch.bench.turns --trees old=/tmp/old new=. --shapes 16x2048x2048 4x2048x4096

A busy GPU runs at its power limit, where the clock depends on what ran before: what comes first
after torch.bmm is up to 4 % slower, whatever it is. So versions take turns, in both orders, and
each runs for a while before it is timed. Every version has a process of its own, which waits while
others are timed. Each line of the output is one measurement; ``of_bmm`` is the rate of the executed
FLOPs as a part of torch.bmm's in the same turns, and whether the results have the same bits is
printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = ("eager", "graph", "bmm")
"""``orthogonalize`` launched from Python or from a CUDA graph, and torch.bmm for comparison."""


class Version:
    """A tree's process; see ``_work`` for what it is asked."""

    def __init__(self, name: str, tree: Path) -> None:
        self.name = name
        paths = [str(tree.resolve()), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        package = Path(self.ask("package")).parent
        if package != tree.resolve() / "flashns_dist":
            self.close()
            raise ValueError(f"version {name}: {tree} has no flashns_dist; found {package}")

    def ask(self, *question: Any) -> Any:
        """Its answer; RuntimeError if the process has failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"version {self.name} failed at {question}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate()


def compare(
    versions: list[Version], shape: tuple[int, ...], seconds: float, rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each version's calls at a shape, in turn; prints whether results differ."""
    bits = {version.name: version.ask("shape", *shape) for version in versions}
    if len(set(bits.values())) > 1:
        print(f"{shape}: the results differ: {bits}")
    pairs = [(version, call) for call in CALLS[:2] for version in versions]
    pairs.append((versions[0], CALLS[2]))
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds):
        for version, call in pairs if turn % 2 == 0 else reversed(pairs):
            found = version.ask("time", call, seconds)
            taken.setdefault((version.name, call), []).append(found)
    return taken


def _work() -> None:
    """Answers questions from standard input, a line of JSON each.

    ``["package"]``: says where its code comes from;
    ``["shape", batch, n, m]``: makes a batch and says what bits its result has;
    ``["time", call, seconds]``: runs a call for some seconds, and then says how long it takes.
    """
    import flashns_dist
    from flashns_dist.orthogonalize import orthogonalize

    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        question, *arguments = json.loads(line)
        answer: Any = flashns_dist.__file__
        if question == "shape":
            batch, n, m = arguments
            generator = torch.Generator(DEVICE).manual_seed(0)

            def random(*shape: int) -> torch.Tensor:
                return torch.randn(*shape, device=DEVICE, generator=generator)  # noqa: B023

            x = random(batch, n, m).bfloat16()
            a, b = random(batch, n, n).half(), random(batch, n, m).half()
            calls = {
                "eager": lambda x=x: orthogonalize(x),  # type: ignore[misc]
                "bmm": lambda a=a, b=b: torch.bmm(a, b),  # type: ignore[misc]
            }
            result = [orthogonalize(x) for _ in range(3)][-1]
            calls["graph"] = _graph(calls["eager"])
            answer = zlib.crc32(result.view(torch.int16).cpu().numpy().tobytes())
        elif question == "time":
            call, seconds = calls[arguments[0]], arguments[1]
            _time(call, seconds)
            answer = _time(call, seconds)
        print(json.dumps(answer), flush=True)


def _graph(call: Callable[[], object]) -> Callable[[], object]:
    if DEVICE == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _time(call: Callable[[], object], seconds: float) -> float:
    from launch.bench.timing import timed

    single = timed(call, 1, 1)[0]
    count = max(1, round(seconds / single))

    def several() -> None:
        for _ in range(count):
            call()

    return timed(several, count, 1)[0]


def main() -> None:
    """Measures the shapes asked for, and prints a table for each."""
    from flashns_dist.orthogonalize import flop_count
    from launch.bench.timing import Record, summarize

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", nargs="+", required=True, help="NAME=FOLDER of each version")
    parser.add_argument("--shapes", nargs="+", required=True, help="as 16x2048x2048")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a call before its timing")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("turns.jsonl"))
    options = parser.parse_args()
    pairs = [tree.partition("=")[::2] for tree in options.trees]
    versions = [Version(name, Path(folder)) for name, folder in pairs]
    record = Record(options.out)
    for text in options.shapes:
        shape = batch, n, m = tuple(map(int, text.split("x")))
        taken = compare(versions, shape, options.seconds, options.rounds)
        bmm = summarize(taken[versions[0].name, "bmm"])
        rate = 2.0 * batch * n * n * m / bmm.median
        record.write("bmm in turn", bmm, shape=list(shape))
        print(f"{text}: bmm {bmm.median * 1e6:.1f} us, {rate / 1e12:.0f} TFLOP/s")
        for (name, call), values in taken.items():
            if call != "bmm":
                timing = summarize(values)
                share = batch * flop_count("auto", n, m) / timing.median / rate
                facts = {"shape": list(shape), "version": name, "kind": call, "of_bmm": share}
                record.write("in turn", timing, **facts)
                print(f"    {name:12s} {call:6s} {timing.median * 1e6:9.1f} us  {share:.3f} of bmm")
    for version in versions:
        version.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["--work"]:
        sys.path.append(str(Path(__file__).parents[2]))  # for what it shares with the others
        _work()
    else:
        main()
