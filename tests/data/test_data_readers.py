from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esrl.data.examples import content_digest
from esrl.data.readers import DataConfig, load_examples
from esrl.data.tables import flatten

GERMAN = "Ein Hund läuft.\nZwei Männer grüßen.\nEin Hund läuft.\n"
ENGLISH = "A dog is running.\nTwo men are greeting.\nA dog is running.\n"


@pytest.fixture
def parallel(tmp_path: Path) -> DataConfig:
    (tmp_path / "x.de").write_text(GERMAN, encoding="utf-8")
    (tmp_path / "x.en.gz").write_bytes(gzip.compress(ENGLISH.encode()))
    return DataConfig(source=Path("x.de"), reference=Path("x.en.gz"), root=tmp_path)


def columns_of(config: DataConfig) -> list[dict[str, str]]:
    return [example.columns for example in load_examples(config).examples]


def test_parallel_text_plain_and_gzip_with_stable_ids(parallel):
    loaded = load_examples(parallel)
    dog = {"source": "Ein Hund läuft.", "reference": "A dog is running."}
    men = {"source": "Zwei Männer grüßen.", "reference": "Two men are greeting."}
    assert [e.columns for e in loaded.examples] == [dog, men, dog]
    expected = [(dog, 0), (men, 0), (dog, 1)]
    assert [e.id for e in loaded.examples] == [f"{content_digest(columns)}-{n}" for columns, n in expected]
    assert (loaded.report.read, loaded.report.kept, loaded.report.repeated) == (3, 3, 1)


def test_blank_lines_are_skipped_counted_and_named_in_one_line(tmp_path):
    # line 2 has a blank source (a no-break space), line 3 an empty reference
    (tmp_path / "a").write_text("eins\n\u00a0\ndrei\nvier\n", encoding="utf-8")
    (tmp_path / "b").write_text("one\ntwo\n\nfour\n", encoding="utf-8")
    loaded = load_examples(DataConfig(source=tmp_path / "a", reference=tmp_path / "b"))
    assert [e.source for e in loaded.examples] == ["eins", "vier"]
    assert str(loaded.report) == f"{tmp_path / 'a'}: 4 read, 2 skipped (empty source or reference), 2 kept"


def test_references_are_optional(tmp_path):
    (tmp_path / "a").write_text("eins\nzwei", encoding="utf-8")
    (tmp_path / "a.tsv").write_text("source\teins\nzwei\t2\n", encoding="utf-8")
    assert columns_of(DataConfig(source=tmp_path / "a")) == [{"source": "eins"}, {"source": "zwei"}]
    assert columns_of(DataConfig(path=str(tmp_path / "a.tsv"), reference_column=None)) == [
        {"source": "zwei", "eins": "2"}
    ]
    assert load_examples(DataConfig(source=tmp_path / "a")).examples[0].reference is None


def test_limit_takes_the_same_examples_from_a_shuffled_file(tmp_path):
    lines = [f"Satz {i}" for i in range(50)]
    chosen = []
    for name, order in (("a", lines), ("b", lines[::-1])):
        (tmp_path / name).write_text("\n".join(order), encoding="utf-8")
        loaded = load_examples(DataConfig(source=tmp_path / name, limit=7))
        chosen.append([e.id for e in loaded.examples])
        assert loaded.report.beyond_limit == 43
    assert chosen[0] == chosen[1][::-1]
    assert "50 read, 43 left out (limit), 7 kept" in str(loaded.report)


def test_tsv_by_name_keeps_further_columns_and_by_number_has_no_header(tmp_path):
    (tmp_path / "t.tsv").write_text("id\tde\ten\n7\tja\tyes\n\n8\tnein\tno\n", encoding="utf-8")
    named = DataConfig(path="t.tsv", source_column="de", reference_column="en", root=tmp_path)
    assert columns_of(named) == [
        {"source": "ja", "reference": "yes", "id": "7"},
        {"source": "nein", "reference": "no", "id": "8"},
    ]
    assert load_examples(named).report.skipped_empty == 1
    numbered = DataConfig(path="t.tsv", source_column="1", reference_column="2", root=tmp_path)
    assert columns_of(numbered)[0] == {"source": "de", "reference": "en", "0": "id"}


def test_a_further_column_called_source_does_not_get_lost(tmp_path):
    (tmp_path / "t.tsv").write_text("source\tde\ten\nweb\tja\tyes\n", encoding="utf-8")
    config = DataConfig(path="t.tsv", source_column="de", reference_column="en", root=tmp_path)
    assert columns_of(config) == [{"source": "ja", "reference": "yes", "original_source": "web"}]


def test_jsonl_dotted_columns_values_of_other_types_and_missing_ones(tmp_path):
    rows = [
        {"translation": {"de": "ja", "en": "yes"}, "score": 0.5, "tags": ["ä", 1], "note": None},
        {"translation": {"de": "nein", "en": "no"}, "extra": "x"},
        {"translation": {"de": None, "en": "gone"}},
    ]
    data = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    config = DataConfig(
        path="t.jsonl.gz", source_column="translation.de", reference_column="translation.en", root=tmp_path
    )
    loaded = load_examples(config)
    assert [e.columns for e in loaded.examples] == [
        {"source": "ja", "reference": "yes", "score": "0.5", "tags": '["ä", 1]', "note": "", "extra": ""},
        {"source": "nein", "reference": "no", "extra": "x", "score": "", "tags": "", "note": ""},
    ]
    assert loaded.report.skipped_empty == 1
    # The id is that of the content, so a later row with a new column does not change it.
    assert loaded.examples[1].id == content_digest({"source": "nein", "reference": "no", "extra": "x"}) + "-0"


def test_hugging_face_folders_saved_and_of_data_files(tmp_path):
    rows = {"translation": [{"de": "ja", "en": "yes"}, {"de": "nein", "en": "no"}], "n": [1, 2]}
    data = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "splits"))
    data.save_to_disk(str(tmp_path / "one"))
    (tmp_path / "files" / "data").mkdir(parents=True)
    data.select([0]).to_parquet(tmp_path / "files" / "data" / "train-00000-of-00002.parquet")
    data.select([1]).to_parquet(tmp_path / "files" / "data" / "train-00001-of-00002.parquet")
    data.select([1]).to_json(tmp_path / "files" / "test.jsonl")
    both = [{"source": "ja", "reference": "yes", "n": "1"}, {"source": "nein", "reference": "no", "n": "2"}]

    def load(folder: str, split: str) -> list[dict[str, str]]:
        names = {"source_column": "translation.de", "reference_column": "translation.en"}
        return columns_of(DataConfig(path=folder, split=split, root=tmp_path, **names))

    assert load("splits", "train") == load("one", "train") == load("files", "train") == both
    assert load("splits", "test") == load("files", "test") == both[1:]
    for folder in ("splits", "files"):
        with pytest.raises(ValueError, match=r"no split 'tset' \(nearest: \"test\"\)"):
            load(folder, "tset")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither"),
        ({"source": Path("a"), "path": "b"}, "both"),
        ({"path": "b.tsv", "reference": Path("a")}, "goes with `source`"),
        ({"path": " "}, "empty"),
        ({"path": "a.tsv", "limit": 0}, "limit is 0"),
        ({"path": "a.tsv", "source_column": ""}, "column name is empty"),
        ({"path": "a.tsv", "source_column": "x", "reference_column": "x"}, "same column"),
        ({"path": "a.tsv", "source_column": "0"}, "mix a number and a name"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@given(
    st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1), max_leaves=9)
)
def test_flatten_keeps_every_leaf_under_its_path(tree):
    def leaves(value: object, path: tuple[str, ...]) -> dict[str, object]:
        if not isinstance(value, dict):
            return {".".join(path): value}
        return {k: v for key, inner in value.items() for k, v in leaves(inner, (*path, key)).items()}

    assert flatten({"root": tree}) == leaves(tree, ("root",))


def test_blank_records_can_be_kept_so_that_example_n_is_line_n(tmp_path):
    (tmp_path / "a").write_text("eins\n\n\u00a0\n", encoding="utf-8")
    (tmp_path / "b").write_text("one\ntwo\n\n", encoding="utf-8")
    loaded = load_examples(DataConfig(source=tmp_path / "a", reference=tmp_path / "b"), keep_blank=True)
    assert [tuple(e.columns.values()) for e in loaded.examples] == [("eins", "one"), ("", "two"), ("\u00a0", "")]
    assert (loaded.report.read, loaded.report.kept, loaded.report.skipped_empty) == (3, 3, 0)
    (tmp_path / "t.jsonl").write_text('\n{"source": "ja", "reference": null}\n', encoding="utf-8")
    for column, expected in (("reference", [("", ""), ("ja", "")]), (None, [("",), ("ja",)])):
        config = DataConfig(path=str(tmp_path / "t.jsonl"), reference_column=column)
        found = [e.columns for e in load_examples(config, keep_blank=True).examples]
        names = ("source", "reference")[: len(expected[0])]
        assert [tuple(columns[name] for name in names) for columns in found] == expected


def test_a_root_that_is_not_there_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "t.tsv").write_text("source\treference\nja\tyes\n", encoding="utf-8")
    root = tmp_path / "nowhere"
    for fields in ({"source": Path("a.de"), "reference": Path("a.en")}, {"path": "t.tsv"}):
        with pytest.raises(ValueError, match=rf"nor a folder {root}\. .*--data\.root.*`esrl data multi30k`"):
            load_examples(DataConfig(root=root, **fields))
    assert columns_of(DataConfig(path=str(tmp_path / "t.tsv"), root=root))  # absolute: the root does not matter
    monkeypatch.setenv("HOME", str(tmp_path))
    assert columns_of(DataConfig(path="~/t.tsv")) == columns_of(DataConfig(path="~/t.tsv", root=root))


def test_a_broken_data_set_of_the_hub_is_one_line(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("An error occurred while\ngenerating the dataset")

    monkeypatch.setattr("esrl.data.tables._require_hub", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"^some/name: neither .*DatasetGenerationError: An error occurred while gen"):
        load_examples(DataConfig(path="some/name"))
