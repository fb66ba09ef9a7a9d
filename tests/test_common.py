import csv
import itertools
import logging
import re
from contextlib import nullcontext

import pandas
import pytest
from folders import refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dreslcl import common
from dreslcl.common import (
    ConfigError,
    TableError,
    atomic,
    hold,
    is_missing,
    read_list,
    read_table,
    reason,
    same_name,
    write_json,
    write_table,
)


def test_file_appears_whole_or_not_at_all(tmp_path):
    for old in (None, '{\n "ü": 1\n}\n'):
        with pytest.raises(RuntimeError), atomic(tmp_path / "deep" / "a.json") as part:
            part.write_text("half")
            raise RuntimeError
        with pytest.raises(TypeError):
            write_json(tmp_path / "deep" / "a.json", object())
        assert [p.read_text(encoding="utf-8") for p in (tmp_path / "deep").iterdir()] == ([old] if old else [])
        write_json(tmp_path / "deep" / "a.json", {"ü": 1})


# tables and lists

ODD = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # what str.splitlines cuts at, and no program that writes tables
letters = st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufeff") | st.sampled_from(ODD + "\r\n\"',;|\t é"), max_size=12)
cells = letters | st.sampled_from(["nan", "NA", "<NA>", "None", "'--", "007", "1,5"])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.text("ab0é", min_size=1), cells, cells), min_size=1),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from([*itertools.product(["\r\n", "\n"], [csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), ("\r", csv.QUOTE_ALL)]),
)
@example([("a", "x\ry", f"x{ODD}y")], ",", "utf-8", ("\n", csv.QUOTE_MINIMAL))
def test_a_table_is_read_as_pandas_reads_it(tmp_path_factory, rows, delimiter, encoding, style):
    path, (end, quoting) = tmp_path_factory.mktemp("t") / ("t.tsv" if delimiter == "\t" else "t.csv"), style
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([["slide_id", "x", "report"], *rows])
    read = [[value.strip() for value in row.values()] for row in read_table(path)]
    assert read == [[cell.strip() for cell in row] for row in rows]
    bare = any("\r" in cell for row in rows for cell in row) and (end, quoting) == ("\n", csv.QUOTE_MINIMAL)
    if not bare:  # a lone return stands there without quotes, and both cut at it
        theirs = pandas.read_csv(path, sep=delimiter, encoding=encoding, dtype=str, keep_default_na=False)
        assert read == [[value.strip() for value in row] for row in theirs.values.tolist()]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(letters, letters), min_size=1))
@example([("=1+1", "-3"), ("@x", "-0.5e-3"), ("-1+1", "+7")])
def test_a_table_that_was_written_is_read_back_its_formulas_made_inert(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    write_table(path, ["id", "text"], rows)
    inert = [
        ["'" * (c[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"[+-]\d+([.]\d*)?([eE][+-]?\d+)?", c)) + c for c in row] for row in rows
    ]
    assert [[*row.values()] for row in read_table(path, ["text"])] == [[c.strip() for c in row] for row in inert]


LISTS = {
    "lines": 'TCGA-05-4000.svs\r\ne\u0301.SVS\r\n\r\n "b.ome.tif" \r\nN/A\r\nb.ome\r\nunknown',
    "a column": "patient_id\nTCGA-05-4000\né\nnan\nb.ome\n",
    "a table": 'subtype\tslide_id\tpatient_id\nx\tTCGA-05-4000.ndpi\tNA\n\t"e\u0301"\t\n\tb.ome.TIFF\t?',
    "old line ends": "TCGA-05-4000\ré\rb.ome\r",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_names_is_read_as_other_programs_write_it(tmp_path, encoding, kind):
    (tmp_path / "l.txt").write_bytes(("\ufeff" * (encoding == "utf-16-be") + LISTS[kind]).encode(encoding))
    assert read_list(tmp_path / "l.txt") == ["TCGA-05-4000", "é", "b.ome"]


def test_a_name_is_one_name_whatever_it_holds_and_marks_where_files_were_joined_are_no_part_of_it(tmp_path):
    names = [f"a{c}b" for c in ODD]
    (tmp_path / "l.txt").write_bytes("\r\n\ufeff".join(["", *names]).encode())
    assert read_list(tmp_path / "l.txt") == names
    (tmp_path / "t.csv").write_bytes("\ufeffslide_id,x\r\na,1\r\n\ufeffb,2\r\n".encode())
    assert [row["slide_id"] for row in read_table(tmp_path / "t.csv")] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; a header line is needed"), (b"a,b\n1,2\n", "no column 'report'; there are a, b"),
        (b"report\n\xff\xe9\n", "not UTF-8 text"), (b"report\n\x00\n", "holds NUL characters"), (None, r"cannot be read \(No such file"),
        (b"report,report\n1,2\n", "column 'report' comes twice"), ("report\nx".encode("utf-16-le"), "holds NUL characters"),
        (b'\nreport,a\nx,y\n\n"two\nlines",z\n"one,b\nc,d\n', "line 7: a quote opens that never closes"),
        (b"\n\n\n", "empty"), (b"\xef\xbb\xbf", "empty"), (b"\xff\xfea\0b", "not UTF-8 text"), (b",,\n,,\n", "no column 'report'"),
        ("report\nx".encode("utf-32"), "NUL characters"), ("report\ngrößer".encode("latin-1"), "not UTF-8 text"),
        (b"PK\x03\x04 a spreadsheet", "no column 'report'"), (b'report\n"x" y\n', "line 2: ',' expected after"),
        (b'report,a\n"the ""end"" of,b\n', "line 2: a quote opens that never closes"),
        (b"report,a\nx,y\n5 mm, grade 2,z\n", "line 3: 3 cells for 2 columns; quote texts that hold ','"),
    ],
)  # fmt: skip
def test_unreadable_table_says_why_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with refused(TableError, message):
        read_table(tmp_path / "t.csv", ["report"])


def test_ids_name_a_scan_by_its_place_and_never_leave_the_folder(tmp_path):
    assert common.slide_id(tmp_path / "a" / "b c.x.svs", tmp_path) == "a__b c.x"
    assert common.slide_id(tmp_path / "only.svs", tmp_path / "only.svs") == "only"
    assert common.check_id("007", "t.csv") == "007"
    for bad in ("", ".hidden", "..", "a/b", "a\\b", "a\nb", "a\x00"):
        with pytest.raises(TableError, match="cannot be an id"):
            common.check_id(bad, "t.csv")


@pytest.mark.parametrize(("mine", "theirs", "works"), [(False, False, False), (True, True, True), (True, False, False)])
def test_a_folder_is_held_alone_or_by_those_who_share_it(tmp_path, mine, theirs, works):
    refusal = nullcontext() if works else refused(common.BusyError, "is in use by process .*; wait until it ends")
    with hold(tmp_path, shared=mine), refusal, hold(tmp_path, shared=theirs):
        pass
    with hold(tmp_path):
        pass


def test_a_log_gets_a_line_with_rate_and_time_left_now_and_then_and_none_where_it_is_quiet(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "dreslcl")
    with common.counting("embedding", 100, "tiles") as done:
        for _ in range(9):
            clock[0] += 8
            done(10)
    for _ in common.track(iter(range(45)), "reading", "reports", 90):
        clock[0] += 1
    logging.getLogger("dreslcl").setLevel(logging.WARNING)
    for _ in common.track(range(90), "writing", "quietly"):
        clock[0] += 1
    said = [record.message.split(" ", 1) for record in caplog.records]
    assert said[:2] == [["embedding", "40/100 tiles 1.25/s 0:00:48 left"], ["embedding", "80/100 tiles 1.25/s 0:00:16 left"]]
    assert said[2:] == [["reading", "30/90 reports 1.00/s 0:01:00 left"]]


def test_a_name_is_the_same_whatever_its_suffix_case_of_suffix_and_unicode_form():
    for text in ("Caf\u00e9 1.svs", "Cafe\u0301 1.SVS", " Caf\u00e9 1.Tiff", "Cafe\u0301 1", "Caf\u00e9 1.svs.h5", "Caf\u00e9 1.JPEG"):
        assert same_name(text) == "Caf\u00e9 1"
    names = ["a", "A", "a.b", "a.1", "a_patches.h5", "tiff", "a b", "x/a.svs", "0.5"]
    assert [same_name(n) for n in names] == ["a", "A", "a.b", "a.1", "a_patches", "tiff", "a b", "x__a", "0.5"]


def test_words_for_no_value_are_known_in_any_case_and_counted():
    words = "NA na N/A #N/A <NA> nan NaN None NULL '-- -- ? Unknown missing".split()
    assert all(map(is_missing, ["", " ", *words, "Not Reported", "not available", "[Not Available]"]))
    assert not any(map(is_missing, ["-", "+", "0", "no", "unknown primary", "NA12878", "none seen", "n", "nano", "-1", "Nanette"]))
    assert common.missing_words(["a", "?", "NA", "?", "0"]) == "2 '?', 1 'NA'" and common.missing_words(["a"]) == ""


@pytest.mark.parametrize(
    "rank, world, address, expected",
    [
        (None, None, None, (0, 1)), ("", " ", None, (0, 1)), (None, "2", None, (0, 1)), ("1", "", None, (0, 1)), ("0", "1", None, (0, 1)),
        ("1", "3", "node1", (1, 3)), ("0", "2", None, None), ("2", "2", "node1", None), ("-1", "2", "node1", None),
        ("one", "2", "node1", None),
    ],
)  # fmt: skip
def test_half_set_ranks_are_told_and_wrong_ones_refused_in_one_line(monkeypatch, caplog, rank, world, address, expected):
    common._warn_once.cache_clear()
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("MASTER_ADDR", address)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(ConfigError, match=r"^[^\n]*torchrun sets all three[^\n]*$"):
            common.rank_and_world()
    else:
        assert common.rank_and_world() == common.rank_and_world() == expected
        half = bool((rank or "").strip()) != bool((world or "").strip())
        assert len(caplog.records) == half  # once


def test_a_reason_is_one_line_also_of_an_error_without_a_text():
    assert reason(OSError(28, "No space left on device")) == "cannot be read (No space left on device)"
    assert [reason(error) for error in (MemoryError(), ValueError(), ValueError("a\n  b"))] == ["not enough memory", "ValueError", "a b"]
    assert len(reason(ValueError("word " * 200))) <= 500
