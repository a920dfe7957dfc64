from __future__ import annotations

import gzip
import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, SpecError
from pipeline.ids import IdReport, check_ids
from pipeline.inputs import list_inputs
from pipeline.user_schema import user_schema


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def names(files):
    return [os.path.basename(file.path) for file in files]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.parquet", "a.pq", "deep/c.parquet", "_SUCCESS", ".a.crc", "_run/x.parquet", ".hidden/y.parquet"):
        write(tmp_path / name, x=[1, 2])
    return tmp_path


# -- which files ----------------------------------------------------------------------------------------------------


def test_directory_is_taken_recursively_and_sorted_without_hidden_names(tree):
    assert names(list_inputs(str(tree))) == ["a.pq", "b.parquet", "c.parquet"]


def test_file_glob_and_list_give_each_file_once_in_the_order_of_first_mention(tree):
    paths = [f"{tree}/b.parquet", f"{tree}/*.p*", f"{tree}/**/*.parquet", str(tree)]
    assert names(list_inputs(paths)) == ["b.parquet", "a.pq", "c.parquet"]


def test_glob_that_matches_directories_takes_what_is_in_them(tree):
    assert names(list_inputs(f"{tree}/d*")) == ["c.parquet"]


def test_hidden_names_are_taken_when_spelled_out(tree):
    assert names(list_inputs([f"{tree}/_run/x.parquet", f"{tree}/.hidden/*.parquet"])) == ["x.parquet", "y.parquet"]


def test_existing_name_with_brackets_is_meant_literally(tmp_path):
    write(tmp_path / "a[1].parquet", x=[1])
    assert names(list_inputs(f"{tmp_path}/a[1].parquet")) == ["a[1].parquet"]


def test_relative_and_absolute_paths_are_the_same_file(tree, monkeypatch):
    monkeypatch.chdir(tree)
    files = list_inputs(["b.parquet", f"{tree}/b.parquet", "./deep/../b.parquet"])
    assert [file.path for file in files] == [f"{tree}/b.parquet"]


def test_every_path_that_matches_nothing_is_named_at_once(tree):
    with pytest.raises(SpecError) as caught:
        list_inputs([f"{tree}/nope.parquet", str(tree), f"{tree}/*.jsonl", f"{tree}/gone/"])
    assert all(word in str(caught.value) for word in ("nope.parquet", "*.jsonl", "gone/"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "empty list"),
        ("", "is empty"),
        ("http://example.invalid/x.parquet", "not allowed"),
        ("simplecache::s3://b/x.parquet", "chains protocols"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_path_that_must_not_be_read_is_refused(path, message):
    with pytest.raises(SpecError, match=message):
        list_inputs(path)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("x.csv", "unknown extension '.csv'"),
        ("x.json", "rename it to .jsonl"),
        ("x.jsonl.gz", "decompress it"),
        ("x", "''"),
    ],
)
def test_unknown_extension_is_refused_with_a_cure(tmp_path, name, cure):
    (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(SpecError, match=cure) as caught:
        list_inputs(str(tmp_path))
    assert name in str(caught.value)


# -- what is in them ------------------------------------------------------------------------------------------------


def test_parquet_rows_and_schema_come_from_the_footer(tmp_path):
    path = write(tmp_path / "a.parquet", x=pa.array([1, 2, 3], pa.int32()), y=["a", None, "c"])
    (file,) = list_inputs(path)
    assert (file.num_rows, file.format, file.size) == (3, "parquet", os.path.getsize(path))
    assert file.schema == pa.schema([("x", pa.int32()), ("y", pa.string())])


def test_files_without_rows_are_legal(tmp_path):
    write(tmp_path / "a.parquet", x=pa.array([], pa.int32()))
    (tmp_path / "b.jsonl").write_text("\n \n")
    files = list_inputs(str(tmp_path))
    assert [file.num_rows for file in files] == [0, 0]
    assert user_schema(files, required=["prompt"]) == pa.schema([("prompt", pa.string())])


def test_version_changes_when_a_file_is_rewritten(tmp_path):
    path = write(tmp_path / "a.parquet", x=[1])
    before = list_inputs(path)[0]
    os.utime(path, ns=(1, 1))
    assert list_inputs(path)[0].version != before.version


@pytest.mark.parametrize("cut", [0, 3, 50, -1, -10])
def test_truncated_parquet_is_refused_by_name(tmp_path, cut):
    path = write(tmp_path / "a.parquet", x=list(range(100)))
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:cut])
    write(tmp_path / "good.parquet", x=[1])
    with pytest.raises(SpecError, match=r"a\.parquet can't be read"):
        list_inputs(str(tmp_path))


def test_columns_that_occur_twice_are_refused(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]), tmp_path / "a.parquet")
    with pytest.raises(SpecError, match="columns x occur twice"):
        list_inputs(str(tmp_path))


# -- S3 -------------------------------------------------------------------------------------------------------------


def test_s3_file_directory_and_glob_are_found_with_their_etag(s3_bucket, tmp_path):
    local = write(tmp_path / "a.parquet", x=[1, 2])
    client = fsspec.filesystem("s3", skip_instance_cache=True)
    for key in ("in/a.parquet", "in/deep/b.parquet", "in/_run/c.parquet", "in2/d.parquet"):
        client.put(local, f"{s3_bucket}/{key}")
    client.pipe_file(f"{s3_bucket}/in/e.jsonl", b'{"x": 1}\n{"x": 2}\n')
    root = f"s3://{s3_bucket}"
    directory = [f"{root}/in/a.parquet", f"{root}/in/deep/b.parquet", f"{root}/in/e.jsonl"]
    files = list_inputs(f"{root}/in")
    assert [file.path for file in files] == directory
    assert [file.num_rows for file in files] == [2, 2, 2]
    assert files[0].version.startswith("etag:")
    assert [file.path for file in list_inputs([f"{root}/i*/*.parquet", f"{root}/in/a.parquet"])] == [
        f"{root}/in/a.parquet",
        f"{root}/in2/d.parquet",
    ]
    with pytest.raises(SpecError, match="matches no file"):
        list_inputs([f"{root}/nothing/", f"s3://{s3_bucket}-none/x.parquet"])


def test_a_misspelt_file_is_asked_about(tmp_path):
    write(tmp_path / "reviews.parquet", x=[1])
    with pytest.raises(SpecError, match=r"matches no file; did you mean 'reviews\.parquet', which is there\?"):
        list_inputs(f"{tmp_path}/review.parquet")
    with pytest.raises(SpecError, match="matches no file; check the spelling"):
        list_inputs(f"{tmp_path}/quite_another.parquet")


def test_unreachable_object_store_is_no_spec_error(s3_server, monkeypatch):
    from pipeline import listing

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    listing._filesystem_of_process.cache_clear()
    try:
        with pytest.raises(InfrastructureError, match="could not be listed"):
            list_inputs("s3://bucket/x.parquet")
    finally:
        listing._filesystem_of_process.cache_clear()


def test_links_to_directories_are_followed_each_directory_once(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "linked.parquet", x=[1])
    (tree / "link").symlink_to(elsewhere)
    (tree / "again").symlink_to(elsewhere)
    (tree / "deep" / "up").symlink_to(tree)
    assert names(list_inputs(str(tree))) == ["a.pq", "linked.parquet", "b.parquet", "c.parquet"]


def test_a_folder_is_known_by_its_own_name_and_read_once_whatever_links_to_it(tmp_path):
    write(tmp_path / "z" / "a.parquet", x=[1])
    (tmp_path / "link").symlink_to(tmp_path / "z")
    for pattern in (tmp_path, f"{tmp_path}/*"):
        assert [file.path for file in list_inputs(str(pattern))] == [str(tmp_path / "z" / "a.parquet")]


def test_link_to_nowhere_is_named_instead_of_hiding_the_other_files(tree):
    (tree / "z.parquet").symlink_to("/nowhere/z.parquet")
    with pytest.raises(SpecError, match=r"z\.parquet' is a link to '/nowhere/z\.parquet', which doesn't exist"):
        list_inputs(str(tree))


# -- ids ------------------------------------------------------------------------------------------------------------


def test_ids_nulls_and_duplicates_are_counted_across_files(tmp_path):
    write(tmp_path / "a.parquet", id=pa.array([1, 2, 2, None, -1], pa.int32()))
    write(tmp_path / "b.parquet", id=pa.array([1, 3, -2], pa.int64()))
    files = list_inputs(str(tmp_path))
    assert check_ids(files, "id") == IdReport(nulls=1, duplicates=2, checked_rows=8, complete=True)
    assert check_ids(files, "id", max_rows=6) == IdReport(nulls=1, duplicates=2, checked_rows=6, complete=False)
