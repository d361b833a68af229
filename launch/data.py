"""Training text as token windows: the same global batch at every world size."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tokens = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

BYTE_VOCAB = 256
SHARD_VOCAB = 50_304
"""GPT-2's 50257 tokens, rounded up to a multiple of 128 as in the NanoGPT speedrun."""
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256

VALIDATION_EVERY = 20
"""One file in this many goes to validation."""

# Character tables, generated topics and test data: not source text as people write it.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)
# Counting more tokens than this changes the entropy by less than the printed digits.
_ENTROPY_TOKENS = 20_000_000


class TokenSource:
    """Token sequences to draw windows from; a window never crosses two sequences."""

    def __init__(self, sequences: Sequence[Tokens]) -> None:
        self.sequences = [sequence for sequence in sequences if len(sequence)]
        self.num_tokens = sum(len(sequence) for sequence in self.sequences)

    def num_windows(self, seq_len: int) -> int:
        """Count the windows of `seq_len` inputs and their next tokens."""
        return sum(max(0, len(sequence) - seq_len) for sequence in self.sequences)

    def windows(self, starts: Tensor, seq_len: int) -> Tensor:
        """Gather windows.

        Args:
            starts: Window numbers below `num_windows(seq_len)`, shape `(batch,)`.
            seq_len: Inputs per window.

        Returns:
            int64 tokens of shape `(batch, seq_len + 1)`.
        """
        counts = [max(0, len(sequence) - seq_len) for sequence in self.sequences]
        ends = np.cumsum(counts)
        rows = np.empty((len(starts), seq_len + 1), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            which = int(np.searchsorted(ends, start, side="right"))
            offset = start - int(ends[which]) + counts[which]
            row[:] = self.sequences[which][offset : offset + seq_len + 1]
        return torch.from_numpy(rows)

    def unigram_entropy(self) -> float:
        """Compute the entropy of single tokens in nats, over at most 20 million of them.

        It is the loss of the best model that ignores the context.
        """
        counts = np.zeros(1, dtype=np.int64)
        left = _ENTROPY_TOKENS
        for sequence in self.sequences:
            part = np.bincount(sequence[:left], minlength=len(counts))
            part[: len(counts)] += counts
            counts, left = part, max(0, left - len(sequence))
        probabilities = counts[counts > 0] / counts.sum()
        return float(-(probabilities * np.log(probabilities)).sum())


@dataclass(frozen=True)
class Dataset:
    """Training and validation tokens with their vocabulary.

    Attributes:
        description: What the tokens are, for the summary.
        vocab_size: One more than the largest possible token, or a rounded-up multiple.
        train: What batches are drawn from.
        validation: What the validation loss is computed on.
    """

    description: str
    vocab_size: int
    train: TokenSource
    validation: TokenSource

    def check(self, seq_len: int) -> None:
        """Raise ValueError if one of the splits has no window of `seq_len` tokens."""
        for split, source in (("training", self.train), ("validation", self.validation)):
            if not source.num_windows(seq_len):
                raise ValueError(
                    f"{self.description}: the {split} split has {source.num_tokens} tokens and no "
                    f"window of {seq_len} + 1. Give more data or a smaller --seq-len."
                )

    def train_batch(
        self, step: int, *, seed: int, batch_size: int, seq_len: int, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Draw the training batch of a step.

        The global batch depends on `seed` and `step` alone; `part` only selects rows of it.

        Args:
            step: Number of the step.
            seed: Seed of the run.
            batch_size: Sequences in the global batch.
            seq_len: Tokens per sequence.
            part: Rows of the global batch to return.

        Returns:
            Inputs and targets, int64, shape `(rows, seq_len)`.
        """
        # Spread by a large odd number: nearby seeds of the generator give related streams.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 2_654_435_761 % 2**63)
        high = self.train.num_windows(seq_len)
        starts = torch.randint(high, (batch_size,), generator=generator)
        rows = self.train.windows(starts[part], seq_len)
        return rows[:, :-1], rows[:, 1:]

    def validation_batch(
        self, index: int, *, num_batches: int, batch_size: int, seq_len: int, part: slice
    ) -> tuple[Tensor, Tensor]:
        """Return one of `num_batches` fixed validation batches, spread evenly over the split.

        Shapes and `part` as in `train_batch`.
        """
        total = num_batches * batch_size
        high = self.validation.num_windows(seq_len)
        numbers = torch.arange(index * batch_size, (index + 1) * batch_size)
        rows = self.validation.windows((numbers * high // total)[part], seq_len)
        return rows[:, :-1], rows[:, 1:]


def load_dataset(patterns: Sequence[str]) -> Dataset:
    """Open the data of a run.

    Args:
        patterns: Files, glob patterns or folders with `.bin` token shards or text files. None at
            all means the source text of the Python standard library on this machine.

    Raises:
        FileNotFoundError: A pattern that matches nothing.
        ValueError: Token shards mixed with text, or a file that is not a token shard.
    """
    if not patterns:
        return _standard_library()
    paths = _expand(patterns)
    num_shards = sum(path.suffix == ".bin" for path in paths)
    if num_shards == len(paths):
        return _token_shards(paths)
    if num_shards:
        raise ValueError(
            f"--data names {num_shards} .bin shards and {len(paths) - num_shards} other files: "
            "tokens and text have different vocabularies. Give one kind."
        )
    return _split_files(f"{len(paths)} text files, byte by byte", paths)


def read_shard(path: Path) -> npt.NDArray[np.uint16]:
    """Map a FineWeb token shard of the NanoGPT speedrun into memory.

    The file holds 256 int32 (magic 20240520, version 1, number of tokens, zeros), then the tokens
    as uint16, all little-endian.

    Raises:
        ValueError: Another magic number or version, or a file of another length than it says.
    """
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC:
        raise ValueError(
            f"{path}: not a token shard: the first int32 is not {SHARD_MAGIC}. "
            "Give shards as the NanoGPT speedrun writes them, or a text file with another suffix."
        )
    if header[1] != SHARD_VERSION:
        raise ValueError(
            f"{path}: version {header[1]} of the shard format; version {SHARD_VERSION} is known."
        )
    num_tokens = int(header[2])
    expected = SHARD_HEADER_INTS * 4 + num_tokens * 2
    if path.stat().st_size != expected:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, and its header announces {num_tokens} tokens, "
            f"{expected} bytes. The file is cut short or damaged: fetch it again."
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_INTS * 4, shape=(num_tokens,))


def _expand(patterns: Sequence[str]) -> list[Path]:
    paths: set[Path] = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        if os.path.isdir(pattern):
            found = glob.glob(f"{glob.escape(pattern)}/**", recursive=True)
            shards = [path for path in found if path.endswith(".bin")]
            found = [path for path in (shards or found) if os.path.isfile(path)]
        elif os.path.isfile(pattern):  # whatever characters are in its name
            found = [pattern]
        else:
            found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not found:
            raise FileNotFoundError(f"--data {pattern}: no such file. Check the path.")
        paths.update(map(Path, found))
    return sorted(paths)


def _standard_library() -> Dataset:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    paths.sort()
    return _split_files(f"Python standard library, {len(paths)} source files, byte by byte", paths)


def _split_files(description: str, paths: Sequence[Path]) -> Dataset:
    files = [np.fromfile(path, dtype=np.uint8) for path in paths]
    if len(files) < VALIDATION_EVERY:
        # Too few to set whole files aside: keep the end of each.
        cuts = [len(file) - len(file) // VALIDATION_EVERY for file in files]
        train = [file[:cut] for file, cut in zip(files, cuts, strict=True)]
        validation = [file[cut:] for file, cut in zip(files, cuts, strict=True)]
    else:
        train = [file for index, file in enumerate(files) if (index + 1) % VALIDATION_EVERY]
        validation = files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    return Dataset(
        description, BYTE_VOCAB, TokenSource(_joined(train)), TokenSource(_joined(validation))
    )


def _joined(files: Sequence[npt.NDArray[np.uint8]]) -> list[Tokens]:
    """Join files with a zero byte after each, so that short files count too."""
    end = np.zeros(1, dtype=np.uint8)
    return [np.concatenate([part for file in files for part in (file, end)])] if files else []


def _token_shards(paths: Sequence[Path]) -> Dataset:
    shards = {path: read_shard(path) for path in paths}
    validation = [shard for path, shard in shards.items() if "val" in path.name]
    train = [shard for path, shard in shards.items() if "val" not in path.name]
    if not validation or not train:
        cuts = [len(shard) - len(shard) // VALIDATION_EVERY for shard in shards.values()]
        train = [shard[:cut] for shard, cut in zip(shards.values(), cuts, strict=True)]
        validation = [shard[cut:] for shard, cut in zip(shards.values(), cuts, strict=True)]
    return Dataset(
        f"{len(paths)} token shards", SHARD_VOCAB, TokenSource(train), TokenSource(validation)
    )
