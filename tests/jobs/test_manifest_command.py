"""`manifest` as a person meets it, and what fleet files are told when they are wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.settings import PoolSettings
from jobs.cli import app
from jobs.fleet_file_source import load_fleet_file, parse_fleet_file
from jobs.spec_fields import field_tree
from pipeline.errors import SpecError

EXAMPLES = Path(__file__).parents[2] / "cluster" / "examples"
FLEET = EXAMPLES / "fleet.yaml"
TEXT = FLEET.read_text()


def test_manifest_is_printed() -> None:
    result = CliRunner().invoke(app, ["manifest", str(FLEET)])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["kind"] == "RayCluster"


def test_manifest_is_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rayjob.yaml"
    words = ["manifest", str(FLEET), "--target", "rayjob", "--job", str(EXAMPLES / "job.yaml"), "--output", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert {document["kind"] for document in yaml.safe_load_all(path.read_text())} == {"RayJob", "ConfigMap"}


def test_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["manifest", str(FLEET), "--output", str(tmp_path / "no" / "x.yaml")])
    assert isinstance(result.exception, SpecError)
    assert "a folder that exists" in result.exception.message


def test_manifest_needs_no_engine(tmp_path: Path) -> None:
    code = (
        "import sys; from jobs.manifest import write_manifest; from pathlib import Path; "
        f"write_manifest(Path({str(FLEET)!r}), target='raycluster', job=None, output=None); "
        "print([name for name in ('ray', 'torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=EXAMPLES.parents[1]
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", ["fleet.yaml", "fleet-gcp.yaml", "fleet-on-premises.yaml"])
def test_examples_are_valid(name: str) -> None:
    assert load_fleet_file(EXAMPLES / name).name == "mixtral"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("gpus_per_node: 8", "gpu_per_node: 8", "did you mean `cluster.groups[0].gpus_per_node`?"),
        ("gpus_per_node: 8", "gpus_per_node: 0", "must be an integer from 1 to 64"),
        ("kubernetes: eks", "kubernetes: ekss", "did you mean `eks`?"),
        ("spot: true", "spot: yes", "write spot: true"),
        ("name: mixtral", "nam: mixtral", "did you mean `name`?"),
        ("tensor_parallel: 2", "tensor_parallel_size: 2", "did you mean `fleet.pools[0].tensor_parallel`?"),
        ("max_model_len: 4096", "max_new_tokens: 4096", "`model.max_new_tokens` is not a field"),
        ("  max_model_len: 4096", "  engine_args: {trust_remote_code: true}", "not an engine argument to set here"),
        ("fleet:\n", "fleet:\n  attach: other\n", "leave out"),
        ("cluster:", "input:\n  path: x\ncluster:", "`input` is not a field"),
    ],
)
def test_mistakes_are_shown_in_their_place_with_a_cure(before: str, after: str, message: str) -> None:
    assert before in TEXT
    with pytest.raises(SpecError) as caught:
        parse_fleet_file(TEXT.replace(before, after, 1), "fleet.yaml")
    assert message in caught.value.message
    assert "fleet.yaml:" in caught.value.message
    assert "sampling" not in caught.value.message


def test_paths_are_those_of_jobs_again_afterwards() -> None:
    with pytest.raises(SpecError):
        parse_fleet_file("name: 1\n", "fleet.yaml")
    assert "sampling" in field_tree().children


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n"])
def test_what_is_no_mapping_is_told_what_it_should_be(text: str) -> None:
    with pytest.raises(SpecError, match="a fleet file is a mapping with: name, model, routing, fleet, serve, cluster"):
        parse_fleet_file(text, "fleet.yaml")


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"there is no such file; cluster/examples/fleet\.yaml"):
        load_fleet_file(tmp_path / "none.yaml")


def test_cluster_section_may_be_left_out() -> None:
    file = parse_fleet_file("name: f\nmodel: {source: tiny}\nfleet: {pools: [{gpu: cpu}]}\ncluster:\n", "fleet.yaml")
    assert file.fleet.pools == [PoolSettings()]
    assert file.cluster.groups == []
