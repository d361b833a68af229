"""Windows, splits and token shards."""

import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.data import BYTE_VOCAB, SHARD_VOCAB, TokenSource, load_dataset, read_shard


def write_shard(path: Path, tokens, *, magic=20240520, version=1, announced=None) -> Path:
    # By struct and bytes, not by the reader's own constants.
    header = struct.pack("<256i", magic, version, announced or len(tokens), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 40)
    return load_dataset([str(path)])


def test_windows_are_the_sequences_own_slices():
    source = TokenSource([np.arange(10, dtype=np.uint8), np.arange(50, 55, dtype=np.uint8)])
    # Seven windows of 3 + 1 tokens in the first sequence, two in the second, none across.
    assert source.num_windows(3) == 9
    windows = source.windows(torch.arange(9), 3)
    assert windows.tolist() == [[i, i + 1, i + 2, i + 3] for i in [*range(7), 50, 51]]
    assert windows.dtype == torch.int64


def test_sequences_shorter_than_a_window_are_never_drawn():
    source = TokenSource([np.zeros(3, np.uint8), np.ones(9, np.uint8), np.zeros(0, np.uint8)])
    assert source.num_windows(4) == 5
    assert bool((source.windows(torch.arange(5), 4) == 1).all())


def test_unigram_entropy_is_that_of_the_counts():
    tokens = np.array([0] * 4 + [1] * 2 + [7] * 2, dtype=np.uint8)
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert TokenSource([tokens]).unigram_entropy() == pytest.approx(expected)
    split = TokenSource([tokens[:3], tokens[3:]])
    assert split.unigram_entropy() == pytest.approx(expected)


def test_batch_depends_on_seed_and_step_alone(text):
    def draw(step, seed):
        return text.train_batch(step, seed=seed, batch_size=8, seq_len=16, part=slice(0, 8))

    inputs, targets = draw(3, 1)
    assert inputs.shape == targets.shape == (8, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert all(torch.equal(a, b) for a, b in zip(draw(3, 1), (inputs, targets), strict=True))
    assert not torch.equal(draw(4, 1)[0], inputs)
    assert not torch.equal(draw(3, 2)[0], inputs)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_parts_of_all_ranks_make_the_same_global_batch(text, num_ranks):
    def draw(part):
        return text.train_batch(5, seed=0, batch_size=8, seq_len=16, part=part)[0]

    rows = 8 // num_ranks
    parts = [draw(slice(rank * rows, (rank + 1) * rows)) for rank in range(num_ranks)]
    assert torch.equal(torch.cat(parts), draw(slice(0, 8)))


def test_validation_batches_are_fixed_and_cover_the_split(text):
    batches = [
        text.validation_batch(i, num_batches=3, batch_size=4, seq_len=16, part=slice(0, 4))[0]
        for i in range(3)
    ]
    starts = torch.cat(batches)[:, 0].tolist()
    high = text.validation.num_windows(16)
    first_byte = int(text.validation.sequences[0][0])
    assert starts == [(first_byte + i * high // 12) % 256 for i in range(12)]


def test_few_text_files_are_split_within_and_many_by_file(tmp_path):
    paths = []
    for i in range(40):
        path = tmp_path / f"{i:02}.txt"
        path.write_bytes(bytes([i]) * 100)
        paths.append(str(path))
    few = load_dataset(paths[:2])
    assert few.vocab_size == BYTE_VOCAB
    assert set(np.unique(few.train.sequences[0])) == {0, 1}
    assert set(np.unique(few.validation.sequences[0])) == {0, 1}
    many = load_dataset([str(tmp_path / "*.txt")])
    # A zero byte ends each file; file 0 holds nothing but zeros too.
    assert set(np.unique(many.validation.sequences[0])) == {0, 19, 39}
    assert set(np.unique(many.train.sequences[0])) == set(range(40)) - {19, 39}


def test_default_is_the_standard_library_without_tests():
    dataset = load_dataset([])
    text = dataset.train.sequences[0].tobytes()
    path = Path(os.__file__)
    source = path.read_bytes()
    assert source in text or source in dataset.validation.sequences[0].tobytes()
    assert len(text) > 3_000_000
    assert 2.5 < dataset.train.unigram_entropy() < 3.5
    assert load_dataset([]).train.sequences[0].tobytes() == text


def test_shard_reader_returns_the_tokens(tmp_path):
    tokens = [0, 1, 50256, 50303, 65535, 300]
    path = write_shard(tmp_path / "a.bin", tokens)
    assert read_shard(path).tolist() == tokens


def test_shards_named_val_are_the_validation_split(tmp_path):
    write_shard(tmp_path / "fineweb_train_000001.bin", range(1000, 1100))
    write_shard(tmp_path / "fineweb_train_000002.bin", range(2000, 2100))
    write_shard(tmp_path / "fineweb_val_000000.bin", range(3000, 3050))
    dataset = load_dataset([str(tmp_path)])
    assert dataset.vocab_size == SHARD_VOCAB == 50304
    assert dataset.train.num_tokens == 200
    assert [sequence[0] for sequence in dataset.validation.sequences] == [3000]


def test_shards_without_val_keep_the_end_of_each(tmp_path):
    write_shard(tmp_path / "a.bin", range(100))
    dataset = load_dataset([str(tmp_path / "*.bin")])
    assert dataset.validation.sequences[0].tolist() == list(range(95, 100))
    assert dataset.train.num_tokens == 95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": 20240801}, "not a token shard"),
        ({"version": 2}, "version 2"),
        ({"announced": 7}, "announces 7 tokens"),
    ],
)
def test_damaged_shard_is_refused(tmp_path, change, message):
    path = write_shard(tmp_path / "a.bin", [1, 2, 3], **change)
    with pytest.raises(ValueError, match=message):
        read_shard(path)


def test_shard_shorter_than_its_header_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<2i", 20240520, 1))
    with pytest.raises(ValueError, match="not a token shard"):
        read_shard(path)


def test_names_with_the_characters_of_patterns_are_names_where_they_exist(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / "notes [draft].txt").write_bytes(bytes(400))
    (folder / "more?.txt").write_bytes(bytes(400))
    (folder / "more1.txt").write_bytes(bytes(400))
    for path, num_files in [(folder, 3), (folder / "notes [draft].txt", 1)]:
        assert load_dataset([str(path)]).description.startswith(f"{num_files} text files")
    assert load_dataset([str(folder / "more?.txt")]).description.startswith("1 text files")


def test_bad_data_arguments_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    write_shard(tmp_path / "a.bin", [1, 2, 3])
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_dataset([str(tmp_path / "missing*.txt")])
    with pytest.raises(ValueError, match="Give one kind"):
        load_dataset([str(tmp_path / "a.*")])
    with pytest.raises(ValueError, match="no window of 64"):
        load_dataset([str(tmp_path / "a.txt")]).check(64)
