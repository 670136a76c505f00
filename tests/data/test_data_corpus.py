"""Odd and broken files: each is read as stated, or refused in a moment with the place in the message (goal R7)."""

from __future__ import annotations

import gzip
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esrl.data.examples import Example
from esrl.data.files import MAX_LINE_BYTES, read_lines
from esrl.data.readers import DataConfig, load_examples

GOOD = b"eins\nzwei\n"
PACKED = gzip.compress(GOOD * 200, mtime=0)

# Content of a source file, with the sources read from it.
FINE = {
    "plain": (GOOD, ["eins", "zwei"]),
    "no_final_newline": (b"eins\nzwei", ["eins", "zwei"]),
    "crlf": (b"eins\r\nzwei\r\n", ["eins", "zwei"]),
    "crlf_no_final_newline": (b"eins\r\nzwei", ["eins", "zwei"]),
    "lone_cr_at_the_end": (b"eins\nzwei\r", ["eins", "zwei"]),
    "one_line_lone_cr_at_the_end": (b"eins\r", ["eins"]),
    "cr_inside_a_line_is_text": (b"ei\rns\nzwei\n", ["ei\rns", "zwei"]),
    "two_crs_lose_one": (b"eins\r\r\nzwei\n", ["eins\r", "zwei"]),
    "bom": (b"\xef\xbb\xbfeins\nzwei\n", ["eins", "zwei"]),
    "bom_inside_is_text": ("eins\n\ufeffzwei\n".encode(), ["eins", "\ufeffzwei"]),
    "u2028_is_text": ("ei\u2028ns\nzwei\n".encode(), ["ei\u2028ns", "zwei"]),
    "u0085_is_text": ("ei\u0085ns\nzwei\n".encode(), ["ei\u0085ns", "zwei"]),
    "form_feed_and_vt_are_text": (b"ei\x0cn\x0bs\nzwei\n", ["ei\x0cn\x0bs", "zwei"]),
    "blank_lines_are_skipped": (b"\neins\n \t\nzwei\n\n", ["eins", "zwei"]),
    "blanks_at_the_ends_stay": (b"  eins \nzwei\n", ["  eins ", "zwei"]),
    "emoji_and_beyond": ("👩‍🚀\n𝔻ä\n".encode(), ["👩‍🚀", "𝔻ä"]),
    "one_mebibyte_line": (b"x" * 2**20 + b"\nzwei\n", ["x" * 2**20, "zwei"]),
    "gzip_without_the_suffix": (gzip.compress(GOOD), ["eins", "zwei"]),
    "two_gzip_members": (gzip.compress(b"eins\n") + gzip.compress(b"zwei\n"), ["eins", "zwei"]),
}

# Content, where the message says it is wrong (after the path), and what it says.
BROKEN = {
    "empty": (b"", ": ", "the file is empty"),
    "empty.gz": (b"", ": ", "the file is empty"),
    "packed_nothing.gz": (gzip.compress(b""), ": ", "the file is empty"),
    "only_bom": (b"\xef\xbb\xbf", ": ", "the file is empty"),
    "only_blank_lines": (b"\n \n\n", ": ", "no usable example among 3 read"),
    # "eins\n" is 5 bytes; the Latin-1 "ü" is byte 1 of line 2
    "latin1": (b"eins\nf\xfcnf\n", ":2: ", "not UTF-8: byte 0xfc at byte offset 6;"),
    "latin1_after_bom": (b"\xef\xbb\xbffei\xdf\n", ":1: ", "byte offset 6;"),
    "cut_inside_a_character": ("eins\nfü".encode()[:-1], ":2: ", "byte 0xc3 at byte offset 6;"),
    "surrogate": (b"\xed\xa0\x80\n", ":1: ", "byte offset 0;"),
    "nul": (b"eins\nzw\0ei\n", ":2: ", "NUL byte at byte offset 7;"),
    "zeros": (bytes(5000), ":1: ", "NUL byte at byte offset 0;"),
    "utf16_bom": ("eins\nzwei\n".encode("utf-16"), ":1: ", "the file is UTF-16"),
    "utf16_be_bom": (b"\xfe\xff" + "eins\n".encode("utf-16-be"), ":1: ", "the file is UTF-16"),
    "utf16_no_bom": ("eins\nzwei\n".encode("utf-16-le"), ":1: ", "the file is UTF-16"),
    "utf32": ("eins\n".encode("utf-32"), ":1: ", "the file is UTF-32"),
    "old_mac": (b"eins\rzwei\r", ":1: ", "carriage returns (old Mac)"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0", ":1: ", "not UTF-8: byte 0x89"),
    "not_gzip.gz": (GOOD, ":1: ", "broken gzip data"),
    "cut_gzip.gz": (PACKED[:-12], "", "broken gzip data"),
    "damaged_gzip.gz": (PACKED[:15] + b"\xff\xff\xff" + PACKED[18:], "", "broken gzip data"),
    "wrong_gzip_sum.gz": (PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "", "broken gzip data"),
    "endless_line.gz": (gzip.compress(bytes([120]) * (MAX_LINE_BYTES + 1), 1), ":1: ", "longer than 16,777,216 bytes"),
    "t1.tsv": (b"source\treference\neins\n", ":2: ", "1 cells, but 2 columns"),
    "t2.tsv": (b"source\treference\na\tb\tc\n", ":2: ", "3 cells, but 2 columns"),
    "t3.tsv": (
        b"sorce\treference\na\tb\n",
        ":1: ",
        'no column "source" (nearest: "sorce"); the columns are "sorce", "re',
    ),
    "t4.tsv": (b"source\treference\tx\tx\n1\t2\t3\t4\n", ":1: ", "names a column twice"),
    "t5.tsv": (b"source\treference\n", ": ", "no usable example among 0 read"),
    "j1.jsonl": (b'{"source": "a", "reference": "b"}\n{"source": \n', ":2: ", "not valid JSON"),
    "j2.jsonl": (b'["a", "b"]\n', ":1: ", "holds a JSON array; each line must hold one object"),
    "j3.jsonl": (b'{"source": 3, "reference": "b"}\n', ":1: ", 'column "source" holds a number (3); it must be a str'),
    "j4.jsonl": (b'{"source": "a", "reference": true}\n', ":1: ", 'column "reference" holds a boolean'),
    "j5.jsonl": (b'{"source": "a"}\n', ":1: ", 'no column "reference"; the columns are "source".'),
    "j6.jsonl": (b'{"source": "\\ud800", "reference": "b"}\n', ":1: ", "unpaired surrogate (U+D800)"),
    "j7.jsonl": (b'{"source": "a\\u0000", "reference": "b"}\n', ":1: ", "NUL character at 1"),
    "j8.jsonl": (b"[" * 100_000 + b"\n", ":1: ", "nested too deeply"),
    "j9.jsonl": (b'{"source": ' + b"9" * 5000 + b"}\n", ":1: ", "not valid JSON"),
    "j10.jsonl": (b'{"source": {"de": "a"}, "reference": "b"}\n', ":1: ", 'the columns are "source.de", "reference"'),
    "p.parquet": (b"PAR1" + bytes(100), ":1: ", "damaged parquet data"),
    "table.xlsx": (b"PK", ": ", "a table of an unknown kind"),
    "table.csv": (b"a,b\n", ": ", "a table of an unknown kind"),
}


def config_for(path: Path) -> DataConfig:
    table = path.suffix in (".tsv", ".jsonl", ".parquet", ".xlsx", ".csv")
    return DataConfig(path=str(path)) if table else DataConfig(source=path)


def refusal(config: DataConfig) -> str:
    started = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        load_examples(config)
    assert time.perf_counter() - started < 5
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", FINE)
def test_odd_files_are_read(name, tmp_path):
    content, expected = FINE[name]
    (tmp_path / name).write_bytes(content)
    assert [example.source for example in load_examples(DataConfig(source=tmp_path / name)).examples] == expected


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_by_place(name, tmp_path):
    content, place, complaint = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(config_for(path))
    assert message.startswith(f"{path}{place}")
    assert complaint in message


def test_unequal_line_counts_name_both_in_either_order(tmp_path):
    long, short = tmp_path / "long", tmp_path / "short"
    long.write_bytes(GOOD * 2)
    short.write_bytes(GOOD)
    for source, reference in ((long, short), (short, long)):
        message = refusal(DataConfig(source=source, reference=reference))
        assert message.startswith(f"{short}:2: the file ends here")
        assert f"{source} has {4 if source == long else 2} lines" in message
        assert f"{reference} has {4 if reference == long else 2}." in message


def test_what_is_no_file_is_refused_unopened(tmp_path):
    (tmp_path / "train.de").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    complaints = {
        tmp_path / "train.den": 'no such file (nearest: "train.de")',
        tmp_path / "nowhere" / "x": "no such file",
        tmp_path / "train.de" / "x": "no such file",
        tmp_path / "folder": "is a directory",
        tmp_path / "pipe": "is a named pipe",
        Path("/dev/zero"): "is a device",
        tmp_path / "loop": "cannot be looked up",
        tmp_path / ("x" * 300): "cannot be looked up",
        Path("nul\0inside"): "cannot be looked up",
    }
    for path, complaint in complaints.items():
        message = refusal(DataConfig(source=path))
        assert message.startswith(f"{path}: "), message
        assert complaint in message
    assert "no such file" in refusal(DataConfig(path=str(tmp_path / "missing.tsv")))
    assert "no dataset in this folder" in refusal(DataConfig(path=str(tmp_path / "folder")))
    assert "is a named pipe" in refusal(DataConfig(path=str(tmp_path / "pipe")))


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert refusal(DataConfig(path=str(tmp_path))).startswith(f"{tmp_path}: damaged data set")


def test_a_name_that_is_neither_here_nor_on_the_hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    # A port where nobody listens stands for a Hub that is out of reach.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    message = refusal(DataConfig(path="nobody/nothing", root=tmp_path))
    assert message.startswith("nobody/nothing: neither a file or folder here")


PIECES = st.sampled_from(
    [
        *(b"\n", b"\r", b"\r\n", b"\t", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08", b"\xc3", b"a", b" "),
        *("ä".encode(), "\u2028".encode(), b'{"source": "a", "reference": "b"}', b'"', b"{", b"source\treference\n"),
        PACKED,
    ]
)
CONTENT = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=12).map(b"".join))


@settings(max_examples=400, deadline=2000)
@given(CONTENT, st.sampled_from(["x", "x.gz", "x.tsv", "x.tsv.gz", "x.jsonl", "x.jsonl.gz"]), st.booleans())
def test_any_bytes_give_examples_or_a_place(tmp_path_factory, content, name, numbered):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    columns = {"source_column": "0", "reference_column": "1"} if numbered else {}
    table = name.startswith(("x.tsv", "x.jsonl"))
    config = DataConfig(path=str(path), **columns) if table else DataConfig(source=path)
    try:
        loaded = load_examples(config)
    except ValueError as error:
        assert re.match(re.escape(str(path)) + r"(:\d+)?: ", str(error)), error
    else:
        assert loaded.report.read == loaded.report.kept + loaded.report.skipped_empty
        assert len({e.id for e in loaded.examples}) == len(loaded.examples) > 0
        assert all(isinstance(e, Example) and e.source.strip() for e in loaded.examples)


@settings(max_examples=200, deadline=2000)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0"), max_size=10), min_size=1))
def test_lines_come_back_as_written(tmp_path_factory, lines):
    lines = [line.rstrip("\r") for line in lines]
    lines[0] = "x" + lines[0]  # not a byte order mark
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    assert list(read_lines(path)) == list(enumerate(lines, start=1))
