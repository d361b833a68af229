"""The command line of the main job: what it refuses."""

from __future__ import annotations

import pytest

from launch.settings import read_settings


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
