import multiprocessing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl import common
from dreslcl.common import (
    BusyError,
    ConfigError,
    TableError,
    atomic,
    check_id,
    file_stamp,
    fingerprint,
    hold,
    rank_and_world,
    read_table,
    same_name,
    slide_id,
    write_json,
    write_table,
)


def test_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic(tmp_path / "deep" / "a.txt") as part:
        part.write_text("half")
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    with atomic(tmp_path / "a.txt") as part:
        part.write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old"


def test_values_that_no_json_can_hold_leave_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"ü": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "ü": 1\n}\n'


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
        (b"", "empty; a header line is needed"),
        (b"a,b\n1,2\n", "no column 'report'; there are a, b"),
        (b"report\n\xff\xe9\n", "not a UTF-8 text table"),
        (b"report\n\x00\n", "holds NUL characters"),
    ],
)
def test_unreadable_table_says_why_in_one_line(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(TableError, match=message) as caught:
        read_table(tmp_path / "t.csv", ["report"])
    assert "\n" not in str(caught.value)


def test_missing_table_is_named(tmp_path):
    with pytest.raises(TableError, match=r"cannot be read \(No such file"):
        read_table(tmp_path / "nothing.csv")


@pytest.mark.parametrize("bad", ["", ".hidden", "..", "a/b", "a\\b", "a\nb", "a\x00"])
def test_id_that_could_leave_the_folder_is_refused(bad):
    with pytest.raises(TableError, match="cannot be an id"):
        check_id(bad, "t.csv")


def test_id_of_a_scan_is_its_place_without_suffix(tmp_path):
    assert slide_id(tmp_path / "a" / "b c.x.svs", tmp_path) == "a__b c.x"
    assert slide_id(tmp_path / "only.svs", tmp_path / "only.svs") == "only"
    assert check_id("007", "t.csv") == "007"


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
    assert (said == "held") == works
    if not works:
        assert "is in use by process" in said and "wait until it ends" in said
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("text", "Caf\u00e9.svs Cafe\u0301.SVS Caf\u00e9.Tiff Cafe\u0301 Caf\u00e9.svs.h5 Caf\u00e9.JPEG".split())
def test_a_name_is_the_same_whatever_its_suffix_case_of_suffix_and_unicode_form(text):
    assert same_name(f" {text} ") == "Caf\u00e9"


def test_other_names_stay_other_names():
    names = ["a", "A", "a.b", "a.1", "a_patches.h5", "tiff", "a b", "x/a.svs", "0.5"]
    assert [same_name(n) for n in names] == ["a", "A", "a.b", "a.1", "a_patches", "tiff", "a b", "x__a", "0.5"]


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": " "}, (0, 1)),
        ({"WORLD_SIZE": "2"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": ""}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "node1"}, (1, 3)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, None),
        ({"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, None),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, None),
    ],
)
def test_half_set_ranks_are_told_and_wrong_ones_refused_in_one_line(monkeypatch, caplog, environment, expected):
    common._tell_of_half_set_ranks.cache_clear()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(ConfigError, match=r"^[^\n]*torchrun sets all three[^\n]*$"):
            rank_and_world()
    else:
        assert rank_and_world() == rank_and_world() == expected
        assert len(caplog.records) == (len([v for v in environment.values() if v.strip()]) == 1)  # once
