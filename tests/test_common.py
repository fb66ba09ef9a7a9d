import logging
import multiprocessing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl import common
from dreslcl.common import (
    BusyError,
    TableError,
    atomic,
    check_id,
    counting,
    file_stamp,
    fingerprint,
    hold,
    is_missing,
    missing_words,
    read_table,
    same_name,
    slide_id,
    track,
    write_json,
    write_table,
)  # fmt: skip


def test_file_appears_whole_or_not_at_all(tmp_path):
    for old in (None, '{\n "ü": 1\n}\n'):
        with pytest.raises(RuntimeError), atomic(tmp_path / "deep" / "a.json") as part:
            part.write_text("half")
            raise RuntimeError
        with pytest.raises(TypeError):
            write_json(tmp_path / "deep" / "a.json", object())
        assert [p.read_text(encoding="utf-8") for p in (tmp_path / "deep").iterdir()] == ([old] if old else [])
        write_json(tmp_path / "deep" / "a.json", {"ü": 1})


letters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"])
cell = st.text(letters, max_size=8).filter(lambda s: s[:1] not in ("=", "+", "-", "@"))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(cell, cell.map(lambda s: s + '",;\t x')), min_size=1))
def test_table_that_was_written_is_read_back_as_strings(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    write_table(path, ["id", "text"], rows)
    assert [(r["id"], r["text"]) for r in read_table(path, ["text"])] == [(a, b.strip()) for a, b in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_other_programs_are_read(tmp_path, encoding, delimiter):
    text = f'slide_id{delimiter} report \r\n007{delimiter}"two\r\nlines, größer"\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    (row,) = read_table(tmp_path / "t.csv", ["slide_id", "report"])
    assert row["slide_id"] == "007" and row["report"].split() == ["two", "lines,", "größer"]


def test_formula_in_a_cell_is_made_inert(tmp_path):
    write_table(tmp_path / "t.csv", ["a", "b"], [("=1+1", -3), ("@x", "-0.5e-3"), ("-1+1", "+7")])
    assert read_table(tmp_path / "t.csv") == [{"a": "'=1+1", "b": "-3"}, {"a": "'@x", "b": "-0.5e-3"}, {"a": "'-1+1", "b": "+7"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; a header line is needed"), (b"a,b\n1,2\n", "no column 'report'; there are a, b"),
        (b"report\n\xff\xe9\n", "not UTF-8 text"), (b"report\n\x00\n", "holds NUL characters"), (None, r"cannot be read \(No such file"),
        (b"report,report\n1,2\n", "column 'report' comes twice"),
    ],
)  # fmt: skip
def test_unreadable_table_says_why_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(TableError, match=message) as caught:
        read_table(tmp_path / "t.csv", ["report"])
    assert "\n" not in str(caught.value)


def test_ids_name_a_scan_by_its_place_and_never_leave_the_folder(tmp_path):
    assert slide_id(tmp_path / "a" / "b c.x.svs", tmp_path) == "a__b c.x"
    assert slide_id(tmp_path / "only.svs", tmp_path / "only.svs") == "only"
    assert check_id("007", "t.csv") == "007"
    for bad in ("", ".hidden", "..", "a/b", "a\\b", "a\nb", "a\x00"):
        with pytest.raises(TableError, match="cannot be an id"):
            check_id(bad, "t.csv")


def test_fingerprint_knows_values_not_order(tmp_path):
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
    (tmp_path / "f").write_text("x")
    before = file_stamp(tmp_path / "f")
    (tmp_path / "f").write_text("xy")
    assert file_stamp(tmp_path / "f") != before


def _try(folder, shared, answer):
    try:
        with hold(folder, shared=shared):
            answer.put("held")
    except BusyError as error:
        answer.put(str(error))


@pytest.mark.parametrize(("mine", "theirs", "works"), [(False, False, False), (True, True, True), (True, False, False)])
def test_folder_is_held_against_other_processes(tmp_path, mine, theirs, works):
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with hold(tmp_path, shared=mine):
        other = context.Process(target=_try, args=(tmp_path, theirs, answer))
        other.start()
        said = answer.get(timeout=30)
        other.join()
    assert said == "held" if works else "is in use by process" in said and "wait until it ends" in said
    with hold(tmp_path):
        pass


def test_a_log_gets_a_line_with_rate_and_time_left_now_and_then(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "dreslcl")
    with counting("embedding", 100, "tiles") as done:
        for _ in range(9):
            clock[0] += 8
            done(10)
    for _ in track(iter(range(45)), "reading", "reports", 90):
        clock[0] += 1
    said = [record.message.split(" ", 1) for record in caplog.records]
    assert said[:2] == [["embedding", "40/100 tiles 1.25/s 0:00:48 left"], ["embedding", "80/100 tiles 1.25/s 0:00:16 left"]]
    assert said[2:] == [["reading", "30/90 reports 1.00/s 0:01:00 left"]]


def test_quiet_logs_nothing(monkeypatch, caplog):
    monkeypatch.setattr(common, "EVERY_S", 0)
    monkeypatch.setattr(logging.getLogger("dreslcl"), "level", logging.WARNING)
    assert list(track([1, 2], "embedding", "tiles")) == [1, 2] and not caplog.records


@pytest.mark.parametrize(
    "text", ["Caf\u00e9 1.svs", "Cafe\u0301 1.SVS", " Caf\u00e9 1.Tiff", "Cafe\u0301 1", "Caf\u00e9 1.svs.h5", "Caf\u00e9 1.JPEG"]
)
def test_a_name_is_the_same_whatever_its_suffix_case_of_suffix_and_unicode_form(text):
    assert same_name(text) == "Caf\u00e9 1"


def test_other_names_stay_other_names():
    names = ["a", "A", "a.b", "a.1", "a_patches.h5", "tiff", "a b", "x/a.svs", "0.5"]
    assert [same_name(n) for n in names] == ["a", "A", "a.b", "a.1", "a_patches", "tiff", "a b", "x__a", "0.5"]


def test_words_for_no_value_are_known_in_any_case_and_counted():
    words = [
        "",
        " ",
        "NA",
        "na",
        "N/A",
        "#N/A",
        "<NA>",
        "nan",
        "NaN",
        "None",
        "NULL",
        "'--",
        "--",
        "?",
        "Unknown",
        "Not Reported",
        "missing",
    ]
    assert all(map(is_missing, [*words, "not available", "[Not Available]"]))
    assert not any(map(is_missing, ["-", "+", "0", "no", "unknown primary", "NA12878", "none seen", "n", "nano", "-1"]))
    assert missing_words(["a", "?", "NA", "?", "0"]) == "2 '?', 1 'NA'" and missing_words(["a"]) == ""
