from __future__ import annotations

import gzip
import hashlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from esrl.data.download import PUBLIC_SETS, DownloadError, PublicSet, fetch, tidy
from esrl.data.readers import DataConfig, load_examples
from esrl.errors import StorageError

RAW = {"train.de.gz": "Ein Hund.\t\n Zwei\tMänner. \n", "train.en.gz": "A dog.\nTwo men.\n"}
TIDY = {"train.de.gz": "Ein Hund.\nZwei Männer.\n", "train.en.gz": "A dog.\nTwo men.\n"}


class Source:
    """A server on this machine; ``answers`` has, by file, what it does before it answers well."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, list[str]] = {}
        self.bodies = {name: gzip.compress(text.encode()) for name, text in RAW.items()}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/raw/")
                outer.asked.append(name)
                pending = outer.answers.get(name, [])
                how = pending.pop(0) if pending else "well"
                body = outer.bodies.get(name)
                if how.isdecimal() or body is None:
                    self.send_error(int(how) if how.isdecimal() else 404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if how == "cut" else body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/raw"


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in TIDY.items()}
    public = PublicSet(base_url="http://127.0.0.1:9", files=digests, licence="For research.")
    monkeypatch.setitem(PUBLIC_SETS, "small", public)
    source = Source()
    thread = threading.Thread(target=source.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield source
    source.server.shutdown()
    thread.join()
    source.server.server_close()


def get(source: Source, folder: Path, say=lambda line: None) -> Path:
    return fetch("small", folder, base_url=source.url, pauses=(0.0, 0.0), say=say, timeout=5)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_fetches_tidies_packs_and_says_the_licence_first(source, tmp_path):
    said: list[str] = []
    folder = get(source, tmp_path / "data", said.append)
    assert folder == tmp_path / "data" / "small"
    assert {p.name: gzip.decompress(p.read_bytes()).decode() for p in folder.iterdir()} == TIDY
    assert said[0] == "For research."
    assert [line.split(":")[0] for line in said[1:]] == ["[1/2] train.de.gz", "[2/2] train.en.gz"]
    loaded = load_examples(DataConfig(source=folder / "train.de.gz", reference=folder / "train.en.gz"))
    assert loaded.examples[1].columns == {"source": "Zwei Männer.", "reference": "Two men."}


def test_what_is_there_and_right_is_not_fetched_again(source, tmp_path):
    folder = get(source, tmp_path)
    before = (folder / "train.de.gz").read_bytes()
    (folder / "train.en.gz").write_bytes(gzip.compress(b"something else\n"))
    source.asked.clear()
    said: list[str] = []
    get(source, tmp_path, said.append)
    assert source.asked == ["train.en.gz"]
    assert said[1] == "[1/2] train.de.gz: already there"
    assert (folder / "train.de.gz").read_bytes() == before
    assert gzip.decompress((folder / "train.en.gz").read_bytes()).decode() == TIDY["train.en.gz"]


def test_half_a_file_left_by_a_crash_is_fetched_again(source, tmp_path):
    folder = get(source, tmp_path)
    path = folder / "train.de.gz"
    path.write_bytes(path.read_bytes()[:20])
    get(source, tmp_path)
    assert gzip.decompress(path.read_bytes()).decode() == TIDY["train.de.gz"]


@pytest.mark.parametrize("trouble", [["cut"], ["cut", "503"], ["429"]])
def test_troubles_that_pass_are_sat_out(source, tmp_path, trouble):
    source.answers["train.de.gz"] = list(trouble)
    folder = get(source, tmp_path)
    assert gzip.decompress((folder / "train.de.gz").read_bytes()).decode() == TIDY["train.de.gz"]
    assert source.asked.count("train.de.gz") == len(trouble) + 1


@pytest.mark.parametrize(
    ("trouble", "asked", "message"),
    [
        (["404"] * 9, 1, "train.de.gz: the server answered 404"),  # asking again does not help
        (["503"] * 9, 3, "train.de.gz: the server answered 503"),
        (["cut"] * 9, 3, "not fetched in 3 attempts (cut off after"),
    ],
)
def test_troubles_that_stay_are_named_and_leave_nothing(source, tmp_path, trouble, asked, message):
    source.answers["train.de.gz"] = trouble
    with pytest.raises(DownloadError) as caught:
        get(source, tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(source.url)
    assert len(source.asked) == asked
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (gzip.compress(b"Ein Hund!\n"), "the text has SHA-256"),
        (gzip.compress(b"Ein Hund.\n" * 50)[:-9], "not a whole gzip file"),
        (b"<html>sign in</html>", "not a whole gzip file"),
        (gzip.compress(b"\xff\n"), "not a whole gzip file of UTF-8"),
    ],
    ids=["other text", "cut gzip", "a page", "not UTF-8"],  # a gzip file holds the time, so it cannot be a test's name
)
def test_a_wrong_file_is_refused_and_not_written(source, tmp_path, body, message):
    source.bodies["train.en.gz"] = body
    with pytest.raises(DownloadError, match=message):
        get(source, tmp_path)
    assert names_in(tmp_path) == ["train.de.gz"]


def test_a_decompression_bomb_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr("esrl.data.download.MAX_FILE_BYTES", 1000)
    source.bodies["train.de.gz"] = gzip.compress(bytes(100_000))  # about 120 bytes packed
    with pytest.raises(DownloadError, match="holds more than 1,000 bytes"):
        get(source, tmp_path)


def test_an_endless_body_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr("esrl.data.download.MAX_FILE_BYTES", 10)
    with pytest.raises(DownloadError, match="more than 10 bytes; this is not the file"):
        get(source, tmp_path)


def test_a_server_that_says_nothing_times_out(source, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DownloadError, match=r"not fetched in 2 attempts .*timed out"):
            fetch("small", tmp_path, base_url=url, pauses=(0.0,), timeout=0.1, say=lambda line: None)


def test_a_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        get(source, tmp_path / "file")


def test_unknown_names_and_schemes(tmp_path):
    with pytest.raises(ValueError, match=r'no public data set "multi3k" \(nearest: "multi30k"\)'):
        fetch("multi3k", tmp_path)
    with pytest.raises(ValueError, match="must start with http"):
        fetch("multi30k", tmp_path, base_url="file:///etc")


def test_tidy_changes_blanks_at_the_ends_and_tabs_alone():
    assert tidy(" a\u00a0b \r\n\tc\td\n") == "a\u00a0b\nc d\n"


def test_multi30k_is_pinned_to_a_commit():
    public = PUBLIC_SETS["multi30k"]
    assert "/a3d2e0d26b56f3846f66a952536ffed4e401d05a/" in public.base_url
    pairs = {f"{part}.{language}.gz" for part in ("train", "val", "test_2016_flickr") for language in ("de", "en")}
    assert set(public.files) == pairs
    local = Path(__file__).parents[3] / "shared" / "data" / "multi30k"
    for name, digest in public.files.items():
        assert len(bytes.fromhex(digest)) == 32
        if local.is_dir():  # the same text, where a copy lies beside the repository
            assert hashlib.sha256(gzip.decompress((local / name).read_bytes())).hexdigest() == digest
