"""The endpoint's rules without a server: rates, room, keys, what a RayService says, and streams put together again."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster.fleet_file import FleetFile
from cluster.manifests_serve import BUILDER
from cluster.serve_batches import open_desk
from cluster.serve_errors import ApiError
from cluster.serve_http import HungUp, Metered
from cluster.serve_keys import KeyFile, add_key, hash_key, read_keys
from cluster.serve_limits import RateLimiter, has_room
from cluster.serve_prompts import PromptMaker
from cluster.serve_settings import ServeSettings
from cluster.serve_types import ChatRequest, CompletionRequest
from jobs.execute import PRIORITIES
from jobs.fleet_file_source import parse_fleet_file
from jobs.manifest import write_manifest
from jobs.serve import plan_endpoint
from pipeline.engine import Completion, Piece
from pipeline.errors import SpecError
from pipeline.model import fetch_model
from pipeline.vllm_streams import OpenStreams
from tests.endpoints import MODEL

EXAMPLE = Path(__file__).parents[2] / "cluster" / "examples" / "fleet.yaml"


def test_a_key_gets_its_minutes_worth_at_once_and_then_one_by_one() -> None:
    rates = RateLimiter(6)
    assert [rates.wait_s("a", 0.0) for _ in range(6)] == [None] * 6
    assert rates.wait_s("a", 0.0) == 10
    assert rates.wait_s("b", 0.0) is None
    assert rates.wait_s("a", 9.0) == 1
    assert rates.wait_s("a", 10.0) is None
    assert [rates.wait_s("a", 1000.0) for _ in range(7)] == [None] * 6 + [10]
    assert RateLimiter(None).wait_s("a", 0.0) is None


@pytest.mark.parametrize(("num_new", "fits"), [(1, True), (4, True), (5, False)])
def test_there_is_room_for_what_engines_run_and_a_few_that_wait(num_new: int, fits: bool) -> None:
    assert has_room(num_new, num_unfinished=14, num_seqs=16, max_waiting=2) is fits


def test_an_upload_is_taken_up_to_a_size_and_for_a_time() -> None:
    async def never() -> Any:
        await asyncio.Event().wait()

    def sends(*messages: dict[str, Any]) -> Any:
        left = list(messages)

        async def receive() -> Any:
            return left.pop(0)

        return receive

    async def drain(metered: Metered) -> int:
        size = 0
        while (message := await metered()).get("more_body"):
            size += len(message["body"])
        return size + len(message["body"])

    piece = {"type": "http.request", "body": b"12345", "more_body": True}
    last = {**piece, "more_body": False}
    assert asyncio.run(drain(Metered(sends(piece, last), limit=10, timeout_s=9))) == 10
    for receive, limit, status in ((sends(piece, piece, last), 9, 413), (never, 9, 408)):
        with pytest.raises(ApiError) as refused:
            asyncio.run(drain(Metered(receive, limit=limit, timeout_s=0.05)))
        assert refused.value.status == status
    with pytest.raises(HungUp):
        asyncio.run(drain(Metered(sends(piece, {"type": "http.disconnect"}), limit=99, timeout_s=9)))


def test_a_directory_for_batches_must_be_usable_and_is_its_owners_alone(tmp_path: Path) -> None:
    def desk(path: Path) -> Any:
        return open_desk(path, lambda records: None, ServeSettings())  # type: ignore[arg-type, return-value]

    assert stat.S_IMODE(desk(tmp_path / "a" / "b").root.stat().st_mode) == 0o700
    tmp_path.chmod(0o755)
    assert stat.S_IMODE(desk(tmp_path).root.stat().st_mode) == 0o755, "a volume's own rights stay"
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match="choose a directory of the head node"):
        desk(tmp_path / "file" / "below")
    assert plan_endpoint("mixtral", "auto", batches=Path("kept")).settings.batches == str(Path("kept").absolute())


def test_a_warm_fleets_name_is_taken_as_one_whatever_files_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixtral").write_text("no fleet file")
    plan = plan_endpoint(None, "auto", attach="mixtral")
    assert (plan.name, plan.file, plan.address) == ("mixtral", None, "auto")
    with pytest.raises(SpecError):
        plan_endpoint("mixtral", "auto")
    with pytest.raises(SpecError, match=r"nosuch is taken for a warm fleet's name.* add --ray ADDRESS"):
        plan_endpoint("nosuch", None)


def test_the_readmes_small_fleet_is_one() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    text = readme.partition("<!-- file: small.yaml -->\n```yaml\n")[2].partition("```")[0]
    fleet = parse_fleet_file(text, name="small.yaml")
    assert (fleet.name, fleet.model.source) == ("small", "tiny")


def test_a_key_after_a_line_that_a_hand_left_without_its_end_locks_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first = add_key(path, "first")
    path.write_text(path.read_text().rstrip("\n"))
    second = add_key(path, "second")
    keys = KeyFile(path)
    assert [keys.name_of(first), keys.name_of(second)] == ["first", "second"]


def test_keys_are_kept_as_hashes_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    assert alice not in path.read_text()
    assert read_keys(path) == {hash_key(alice): "alice", hash_key(bob): "bob"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(SpecError, match="has a key named 'bob'"):
        add_key(path, "bob")
    with pytest.raises(SpecError, match="can't name a key"):
        add_key(path, "a b")
    file = KeyFile(path)
    assert (file.name_of(alice), file.name_of(bob), file.name_of("tm-x")) == ("alice", "bob", None)
    path.unlink()
    assert file.name_of(alice) is None


def test_a_rayservice_is_what_serve_and_we_can_read() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = write_manifest(EXAMPLE, target="rayservice", job=None, output=None)
    [service] = yaml.safe_load_all(text)
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema(**config).applications
    assert application.import_path == BUILDER
    file = FleetFile.model_validate(application.args["fleet_file"])
    assert file.serve.keys is not None
    assert not file.serve.is_loopback
    [container] = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert any(file.serve.keys.startswith(mount["mountPath"]) for mount in container["volumeMounts"])


def test_a_rayservice_keeps_batches_on_a_volume_or_is_refused(tmp_path: Path) -> None:
    def manifest_with(path: str) -> str:
        file = yaml.safe_load(EXAMPLE.read_text())
        file["serve"] = {**file.get("serve", {}), "batches": path}
        file["cluster"]["volumes"] = [{"claim": "rows", "path": "/rows"}]
        (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(file))
        return write_manifest(tmp_path / "fleet.yaml", target="rayservice", job=None, output=None)

    assert "batches: /rows/batches" in manifest_with("/rows/batches")
    for path in ("/var/batches", "/rowsbatches"):
        with pytest.raises(SpecError, match=f"serve.batches {path} lies in no volume"):
            manifest_with(path)


def test_people_go_before_every_run_and_a_seed_is_kept(tiny: PromptMaker) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "seed": 7, "stop": "x", "max_tokens": 5}
    [request] = tiny.chat(ChatRequest.model_validate(body)).requests
    assert request.priority < min(PRIORITIES.values())
    assert (request.seed, request.sampling.stop, request.sampling.max_tokens) == (7, ["x"], 5)
    [free] = tiny.chat(ChatRequest.model_validate({"model": "m", "messages": body["messages"]})).requests
    assert free.sampling.max_tokens == 512 - len(free.prompt_token_ids)
    assert free.seed is not None


def test_text_to_continue_gets_a_beginning_and_no_template(tiny: PromptMaker) -> None:
    asked = tiny.completion(CompletionRequest.model_validate({"model": "m", "prompt": ["hi</s>", "ho"], "n": 2}))
    assert asked.num_samples == 4
    ids = asked.requests[0].prompt_token_ids
    assert ids[0] == 1
    assert 2 not in ids, "what a user types is no control token"
    [given] = tiny.completion(CompletionRequest.model_validate({"model": "m", "prompt": [1, 5]})).requests
    assert given.prompt_token_ids == [1, 5]
    with pytest.raises(ApiError, match="token id 99999"):
        tiny.completion(CompletionRequest.model_validate({"model": "m", "prompt": [99999]}))


@pytest.fixture(scope="module")
def tiny() -> PromptMaker:
    path = fetch_model(MODEL).path
    return PromptMaker(path, max_model_len=512, vocab_size=32000, settings=ServeSettings())


def delta(index: int, text: str, ids: list[int], finish: str | None = None) -> Any:
    return SimpleNamespace(
        index=index,
        text=text,
        token_ids=ids,
        logprobs=None,
        finish_reason=finish,
        stop_reason=None,
        cumulative_logprob=-1.0 if finish else None,
        routed_experts=None,
    )


def output(request_id: str, *deltas: Any, finished: bool = False) -> Any:
    return SimpleNamespace(
        request_id=request_id, outputs=list(deltas), finished=finished, num_cached_tokens=0, metrics=None
    )


def test_streams_are_put_together_again_and_others_left_alone() -> None:
    streams = OpenStreams(layers=[0])
    streams.open("a", 2)
    other = output("b", delta(0, "x", [1], "stop"), finished=True)
    mine, others = streams.take([output("a", delta(0, "he", [1])), other, output("a", delta(1, "bye", [7], "stop"))])
    assert others == [other]
    assert [(piece.index, piece.text) for piece in mine if isinstance(piece, Piece)] == [(0, "he"), (1, "bye")]
    mine, others = streams.take([output("a", delta(0, "llo", [2, 3], "length"), finished=True)])
    assert others == []
    whole = mine[-1]
    assert isinstance(whole, Completion)
    assert [(s.text, s.token_ids, s.finish_reason) for s in whole.samples] == [
        ("hello", (1, 2, 3), "length"),
        ("bye", (7,), "stop"),
    ]
    assert not streams
