"""Corpora of every format, the byte-level task on them, and what a user's mistakes look like."""

from __future__ import annotations

import builtins
import hashlib
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from mendel.proxies import corpus
from mendel.proxies.corpus import SEPARATOR, Corpus, read_corpus
from mendel.proxies.task import ProxyError
from mendel.proxies.tasks import ProxyConfig, make_task
from mendel.proxies.text import TextTask, split_corpus

DOCUMENTS = ["the first document\n", "the second, über öl", "a third one"]
BYTES = tuple(d.encode() for d in DOCUMENTS)


def read(text: Path | str, **options: Any) -> tuple[bytes, ...]:
    return read_corpus(str(text), **{"max_bytes": 100_000, **options}).documents


def task(text: Path | None, seed: int = 0, **settings: object) -> TextTask:
    place = None if text is None else str(text)
    flat = {"task": "byte-text", "steps": 1, "text": place, **settings}
    made = make_task(ProxyConfig.model_validate(flat), seed)
    assert isinstance(made, TextTask)
    return made


def write_arrow(path: Path, documents: list[str], file_format: bool = False) -> None:
    table = pa.table({"text": documents, "id": list(range(len(documents)))})
    new = pa.ipc.new_file if file_format else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def save_dataset(folder: Path, documents: list[str]) -> None:
    """What `datasets.Dataset.save_to_disk` leaves: shards in the order of state.json."""
    folder.mkdir(parents=True)
    write_arrow(folder / "data-00001-of-00002.arrow", documents[2:])
    write_arrow(folder / "data-00000-of-00002.arrow", documents[:2])
    shards = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": shards, "_split": None}))
    (folder / "dataset_info.json").write_text("{}")


class TestFormats:
    def test_plain_file_of_any_suffix(self, tmp_path: Path) -> None:
        path = tmp_path / "book.xyz"
        path.write_text(DOCUMENTS[1])
        assert read(path) == (BYTES[1],)

    def test_folder_in_sorted_order(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        for name, text in zip(["c.py", "a.txt", "b/x.MD"], DOCUMENTS, strict=True):
            (tmp_path / name).write_text(text)
        (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
        assert read(tmp_path) == (BYTES[1], BYTES[2], BYTES[0])

    def test_glob(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for name in ["b.txt", "sub/a.txt", "c.md"]:
            (tmp_path / name).write_text(name)
        assert read(tmp_path / "*.txt") == (b"b.txt",)
        assert read(tmp_path / "**" / "*.txt") == (b"b.txt", b"sub/a.txt")

    def test_json_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        rows = [json.dumps({"text": d, "body": d.upper()}) for d in DOCUMENTS]
        path.write_text("\n\n".join(rows) + "\n")
        assert read(path) == BYTES
        assert read(path, text_field="body")[2] == b"A THIRD ONE"

    def test_parquet(self, tmp_path: Path) -> None:
        pq.write_table(
            pa.table({"text": [*DOCUMENTS, None], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet"
        )
        assert read(tmp_path / "a.parquet") == BYTES
        assert read(tmp_path) == BYTES

    @pytest.mark.parametrize("file_format", [False, True])
    def test_arrow(self, tmp_path: Path, file_format: bool) -> None:
        write_arrow(tmp_path / "a.arrow", DOCUMENTS, file_format)
        assert read(tmp_path / "a.arrow") == BYTES

    def test_dataset_on_disk(self, tmp_path: Path) -> None:
        save_dataset(tmp_path / "set", DOCUMENTS)
        assert read(tmp_path / "set") == BYTES

    def test_dataset_with_splits(self, tmp_path: Path) -> None:
        save_dataset(tmp_path / "train", DOCUMENTS)
        save_dataset(tmp_path / "test", ["x", "y", "z"])
        (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
        assert read(tmp_path) == BYTES
        assert read(tmp_path, split="test") == (b"x", b"y", b"z")
        with pytest.raises(ProxyError, match="no split 'dev'; it has train, test"):
            read(tmp_path, split="dev")

    def test_cap_keeps_whole_documents(self, tmp_path: Path) -> None:
        for i in range(5):
            (tmp_path / f"{i}.txt").write_text(str(i) * 10)
        assert read(tmp_path, max_bytes=34) == (b"0" * 10, b"1" * 10, b"2" * 10)
        assert read(tmp_path, max_bytes=33) == (b"0" * 10, b"1" * 10, b"2" * 10)
        assert read(tmp_path, max_bytes=32) == (b"0" * 10, b"1" * 10)
        assert read(tmp_path, max_bytes=6) == (b"0" * 5,)

    def test_a_changed_file_is_read_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("one")
        before = os.stat(path)
        first = read_corpus(str(path), max_bytes=100)
        path.write_text("two")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        second = read_corpus(str(path), max_bytes=100)
        assert second.documents == (b"two",)
        assert first.fingerprint()["sha256"] != second.fingerprint()["sha256"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("absent.txt", None, "does not exist; it is a file, a folder or a glob"),
            ("*.txt", None, "matches no file"),
            ("empty.txt", b"", "no text in it"),
            ("binary.bin", b"\x7fELF\0\0", "is not text: it holds zero bytes"),
            ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl:2 is not JSON"),
            ("a.jsonl", b'{"body": "x", "id": 3}\n', "a.jsonl:1: no field 'text'; it has body, id"),
            ("a.jsonl", b'["x"]\n', "no field 'text'; it has list"),
            ("a.jsonl", b'{"text": 5}\n', "field 'text' is int, not text"),
            ("a.parquet", b"not at all", "is not a parquet file"),
            ("a.arrow", b"not at all", "is not an Arrow file"),
        ],
    )
    def test_one_line(self, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ProxyError, match=words) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
        assert name in str(error.value)

    def test_folder_without_text(self, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(b"1")
        with pytest.raises(ProxyError, match=r"no file in this folder ends in one of .*\.txt"):
            read(tmp_path)

    @pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
    def test_absent_field_in_a_table(self, tmp_path: Path, name: str) -> None:
        if name == "a.parquet":
            pq.write_table(pa.table({"text": DOCUMENTS, "id": [1, 2, 3]}), tmp_path / name)
        else:
            write_arrow(tmp_path / name, DOCUMENTS)
        with pytest.raises(ProxyError, match="no field 'body'; it has text, id"):
            read(tmp_path / name, text_field="body")
        with pytest.raises(ProxyError, match="field 'id' is int, not text"):
            read(tmp_path / name, text_field="id")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_unreadable(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("x")
        path.chmod(0)
        with pytest.raises(ProxyError, match="Permission denied"):
            read(path)

    def test_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
        original = builtins.__import__

        def absent(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.startswith("pyarrow"):
                raise ImportError(name)
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", absent)
        with pytest.raises(ProxyError, match=r"needs pyarrow.*pip install 'mendel\[parquet\]'"):
            read(tmp_path / "a.parquet")

    def test_too_short(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x" * 500)
        with pytest.raises(ProxyError, match="held-out part has 50 bytes, fewer than length"):
            task(tmp_path / "a.txt", length=64)


class TestSplit:
    def test_one_document(self) -> None:
        text = bytes(range(1, 101)) * 10
        train, test, how = split_corpus(Corpus("x", (text,)))
        assert bytes(train) + bytes(test) == text + bytes([SEPARATOR])
        assert len(test) == 100
        assert how == "the last 10% of the bytes"

    def test_many_documents(self) -> None:
        documents = tuple(f"document {i % 500}".encode() for i in range(600))
        train, test, how = split_corpus(Corpus("x", documents))
        kept, held = (bytes(part).split(bytes([SEPARATOR]))[:-1] for part in (train, test))
        assert sorted(kept + held) == sorted(documents)
        assert not set(kept).intersection(held), "copies of a document fall on one side"
        assert 0.01 < len(held) / 600 < 0.12
        assert how == f"{len(held)} of 600 documents, by content hash"

    def test_a_dominating_document_falls_back(self) -> None:
        documents = (*(b"%d" % i for i in range(200)), b"x" * 100_000)
        held = [d for d in documents if hashlib.sha256(d).digest()[0] < 0.05 * 256]
        assert b"x" * 100_000 not in held, "choose another letter"
        _, test, how = split_corpus(Corpus("x", documents))
        assert how.startswith("the last")
        assert len(test) == sum(len(d) + 1 for d in documents) // 10


class Bigram(nn.Module):
    """Log-probabilities of the next byte from a table, (256, 256)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.table[tokens], None


class TestTask:
    @pytest.fixture
    def book(self, tmp_path: Path) -> Path:
        rng = np.random.default_rng(0)
        words = ["alpha", "beta", "gamma", "delta"]
        path = tmp_path / "book.txt"
        path.write_text(" ".join(rng.choice(words, 4_000)))
        return path

    def test_windows(self, tmp_path: Path) -> None:
        book = tmp_path / "numbers.txt"
        book.write_text(" ".join(str(i) for i in range(5_000)))
        made = task(book, length=32, test_bytes=640)
        text = book.read_bytes() + bytes([SEPARATOR])
        assert made.test_windows.shape == (20, 33)
        tail = bytes(made.test_text)
        places = [tail.index(bytes(row.astype(np.uint8))) for row in made.test_windows]
        assert text.endswith(tail)
        assert all(b - a >= 33 for a, b in itertools.pairwise(places))
        assert places[-1] > 0.9 * len(tail)
        batch = made.train_batch(3, 16)
        assert batch.inputs.shape == (16, 32)
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert bytes([*inputs, targets[-1]]) in bytes(made.train_text)
            assert inputs[1:] == targets[:-1]

    def test_training_windows_reach_both_ends(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("".join(chr(32 + i % 90) for i in range(200)))
        made = task(tmp_path / "a.txt", length=16)
        first = {bytes(r) for s in range(200) for r in made.train_batch(s, 8).inputs.tolist()}
        text = bytes(made.train_text)
        assert text[:16] in first
        assert text[-17:-1] in first

    def test_seed(self, book: Path) -> None:
        one, two, other = task(book), task(book), task(book, seed=1)
        assert torch.equal(one.train_batch(5, 4).inputs, two.train_batch(5, 4).inputs)
        assert not torch.equal(one.train_batch(5, 4).inputs, one.train_batch(6, 4).inputs)
        assert not torch.equal(one.train_batch(5, 4).inputs, other.train_batch(5, 4).inputs)
        assert (one.test_windows == other.test_windows).all()

    def test_score(self, book: Path) -> None:
        made = task(book, length=64)
        uniform = made.evaluate(Bigram(torch.zeros(256, 256)), 7)
        assert uniform["bits_per_byte"] == pytest.approx(8)
        assert uniform["score"] == pytest.approx(0, abs=1e-6)
        assert uniform["loss"] == pytest.approx(8 * math.log(2))

        counts = np.full((256, 256), 0.01)
        train = made.train_text
        np.add.at(counts, (train[:-1], train[1:]), 1)
        table = np.log(counts / counts.sum(1, keepdims=True))
        pairs = made.test_windows
        nats = -table[pairs[:, :-1], pairs[:, 1:]].mean()
        metrics = made.evaluate(Bigram(torch.from_numpy(table)), 7)
        assert metrics["loss"] == pytest.approx(nats, rel=1e-5)
        assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2), rel=1e-5)
        assert metrics["score"] == pytest.approx(1 - metrics["bits_per_byte"] / 8)

        wrong = made.evaluate(Bigram(torch.from_numpy(-5 * table)), 7)
        assert wrong["bits_per_byte"] > 8
        assert wrong["score"] == 0

    def test_fingerprint(self, book: Path) -> None:
        made = task(book)
        text = book.read_bytes() + bytes([SEPARATOR])
        assert made.corpus_fingerprint == {
            "source": str(book),
            "sha256": hashlib.sha256(text).hexdigest(),
            "bytes": len(text),
            "documents": 1,
        }
        assert made.describe()["corpus_fingerprint"] == made.corpus_fingerprint
        json.dumps(made.describe())


class TestStandardLibrary:
    def test_default(self) -> None:
        made = task(None, max_bytes=400_000, length=128)
        again = read_corpus(None, max_bytes=400_000)
        print_ = made.corpus_fingerprint
        assert print_ == again.fingerprint()
        assert print_["source"] == corpus.STDLIB
        assert 300_000 < print_["bytes"] <= 400_000
        assert b"from __future__" in bytes(made.train_text)

    def test_no_tests_and_no_packages(self) -> None:
        paths = corpus._stdlib_files()
        assert paths == sorted(paths)
        assert len(paths) > 100
        parts = {part for path in paths for part in path.parts[-4:-1]}
        assert not parts & {"test", "tests", "site-packages", "dist-packages"}

    def test_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        with pytest.raises(ProxyError, match="no source of its standard library"):
            read_corpus(None, max_bytes=1_000)
