"""Finding and refusing models: every refusal names the cure, and nothing has started by then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.chat_encoder import choose_encoder
from pipeline.engine import MoeShape
from pipeline.errors import SpecError
from pipeline.model import cache_directory, context_length, fetch_model, inspect_model, moe_shape
from pipeline.settings import ModelSettings
from tests.tiny_models import write_chatml_tokenizer

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def write_model(folder: Path, config: dict[str, Any] | None = None, weights: str | None = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MIXTRAL if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    if weights:
        (folder / weights).write_bytes(b"0" * 100)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAMONTANE_CACHE", str(tmp_path / "cache"))
    return cache_directory()


# The routing-relevant fields of the published configs.
CONFIGS = [
    ("Mixtral-8x7B", {"num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2}, (32, 8, 2)),
    ("Mixtral-8x22B", {"num_hidden_layers": 56, "num_local_experts": 8, "num_experts_per_tok": 2}, (56, 8, 2)),
    ("Qwen3-30B-A3B", {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8}, (48, 128, 8)),
    ("OLMoE-1B-7B", {"num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8}, (16, 64, 8)),
    (
        "DeepSeek-V3",
        {"num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3},
        (58, 256, 8),
    ),
    (
        "Qwen-MoE with dense layers",
        {
            "num_hidden_layers": 8,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
        (3, 60, 4),
    ),
    (
        "Llama-4-Maverick",
        {
            "text_config": {
                "num_hidden_layers": 8,
                "num_local_experts": 128,
                "num_experts_per_tok": 1,
                "moe_layers": [1, 3, 5, 7],
            }
        },
        (4, 128, 1),
    ),
    (
        "gpt-oss-20b",
        {"num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4},
        (24, 32, 4),
    ),
    ("DBRX", {"n_layers": 40, "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}, (40, 16, 4)),
    (
        "Llama-4-Scout",
        {"text_config": {"num_hidden_layers": 48, "num_local_experts": 16, "num_experts_per_tok": 1}},
        (48, 16, 1),
    ),
]


@pytest.mark.parametrize(("config", "shape"), [entry[1:] for entry in CONFIGS], ids=[entry[0] for entry in CONFIGS])
def test_layers_experts_and_top_k_are_read_from_published_configs(config: dict[str, Any], shape: Any) -> None:
    assert moe_shape(config) == MoeShape(*shape)


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 32, "num_attention_heads": 32},
        {"num_hidden_layers": 32, "num_experts": 0, "num_experts_per_tok": 0},
        {"num_hidden_layers": 32, "num_experts": None, "num_experts_per_tok": None},
        {"num_hidden_layers": 32, "num_local_experts": 1, "num_experts_per_tok": 1},
        {"num_hidden_layers": 32, "text_config": None, "ffn_config": None},
    ],
    ids=["llama", "moe switched off", "moe null", "one expert", "null sections"],
)
def test_a_dense_models_config_has_no_routing_shape(config: dict[str, Any]) -> None:
    assert moe_shape(config) is None


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 32768}, 32768),
        ({"max_position_embeddings": 32768, "rope_scaling": None}, 32768),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, None),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"text_config": {"max_position_embeddings": 262144}}, 262144),
        ({}, None),
    ],
)
def test_the_context_length_is_the_configs_unless_it_is_scaled(config: dict[str, Any], length: int | None) -> None:
    assert context_length(config) == length


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", MIXTRAL | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    with pytest.raises(SpecError, match=r"auto_map in config.json.*use a model that transformers and vLLM implement"):
        fetch_model(ModelSettings(source=str(folder)))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", None])
def test_pickled_or_missing_weights_are_refused(tmp_path: Path, weights: str | None) -> None:
    folder = write_model(tmp_path / "m", weights=weights)
    with pytest.raises(SpecError, match=r"no \*\.safetensors in .*convert the weights"):
        fetch_model(ModelSettings(source=str(folder)))


def test_a_model_without_a_tokenizer_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "tokenizer.json").rename(folder / "tokenizer_config.json")
    for weights in (False, True):
        with pytest.raises(SpecError, match=r"no tokenizer in .*without which no engine starts; add .*tokenizer\.json"):
            fetch_model(ModelSettings(source=str(folder)), weights=weights)
    (folder / "tokenizer.model").touch()
    assert fetch_model(ModelSettings(source=str(folder))).architecture


@pytest.mark.parametrize("text", ["{", "[1]", "", "\ufeffx"])
def test_a_config_that_is_no_json_object_is_a_spec_error(tmp_path: Path, text: str) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(SpecError, match=r"config\.json.*download the model again"):
        fetch_model(ModelSettings(source=str(folder)))


def test_a_directory_without_config_is_a_spec_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"holds no config\.json; give a directory of a Hugging Face model"):
        fetch_model(ModelSettings(source=str(tmp_path)))


def test_a_model_without_chat_template_is_refused_with_the_cure(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    write_chatml_tokenizer(folder, template=None)
    with pytest.raises(SpecError, match=r"has no chat template.*add a chat_template\.jinja"):
        choose_encoder(folder)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c", "mixtral"])
def test_a_source_that_does_not_exist_is_a_spec_error_naming_the_choices(source: str) -> None:
    with pytest.raises(
        SpecError, match="is no directory on this machine; give `tiny`, `random`, a directory"
    ) as caught:
        fetch_model(ModelSettings(source=source))
    assert source in str(caught.value)


def test_a_hub_id_without_network_fails_quickly_and_says_what_to_do(tmp_path: Path) -> None:
    code = (
        "from pipeline.errors import RunError; from pipeline.model import fetch_model;"
        "from pipeline.settings import ModelSettings\n"
        "try: fetch_model(ModelSettings(source='no-such-org/no-such-model'))\n"
        "except RunError as error: print(error.exit_code, error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    answer = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=60)
    assert time.monotonic() - began < 30
    assert answer.startswith("3 model.source 'no-such-org/no-such-model' is neither a local directory nor cached")
    assert "copy the model to a directory and give its path" in answer


def test_a_model_is_fetched_from_object_storage_once(cache: Path, tmp_path: Path, s3_bucket: str) -> None:
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    folder = write_model(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for file in folder.iterdir():
        fs.put_file(str(file), f"{s3_bucket}/models/m/{file.name}")
    settings = ModelSettings(source=f"s3://{s3_bucket}/models/m")
    found = fetch_model(settings)
    assert found.moe == MoeShape(4, 8, 2)
    assert Path(found.path).is_relative_to(cache)
    names = {file.name for file in Path(found.path).iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"}, (
        "pickles stay where they are"
    )
    written = {file.name: file.stat().st_mtime_ns for file in Path(found.path).iterdir()}
    assert fetch_model(settings) == found
    assert {file.name: file.stat().st_mtime_ns for file in Path(found.path).iterdir()} == written


def test_a_model_that_changed_in_object_storage_is_fetched_anew(cache: Path, tmp_path: Path, s3_bucket: str) -> None:
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    folder = write_model(tmp_path / "m")
    settings = ModelSettings(source=f"s3://{s3_bucket}/m")
    digests, paths = set(), set()
    for top_k in (2, 3):
        (folder / "config.json").write_text(json.dumps(MIXTRAL | {"num_experts_per_tok": top_k}))
        for file in folder.iterdir():
            fs.put_file(str(file), f"{s3_bucket}/m/{file.name}")
        found = fetch_model(settings)
        digests.add(found.digest)
        paths.add(found.path)
    assert len(digests) == len(paths) == 2


@pytest.mark.parametrize("prefix", ["", "empty/"])
def test_nothing_at_a_url_is_a_spec_error(cache: Path, s3_bucket: str, prefix: str) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        fetch_model(ModelSettings(source=f"s3://{s3_bucket}/{prefix}nothing"))


@pytest.mark.long
def test_four_processes_that_race_make_the_tiny_model_once(cache: Path) -> None:
    code = (
        "from pipeline.model import fetch_model; from pipeline.settings import ModelSettings;"
        "found = fetch_model(ModelSettings(source='tiny')); print(found.digest, found.path)"
    )
    command = [sys.executable, "-c", code]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {racer.communicate(timeout=100)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0, 0]
    assert len(answers) == 1
    assert [path.name for path in cache.iterdir()] == [Path(answers.pop().split()[1]).name], "debris is left"


def test_the_digest_follows_config_and_template_but_not_the_place(tmp_path: Path) -> None:
    one = inspect_model("m", write_model(tmp_path / "one"), None)
    two = inspect_model("m", write_model(tmp_path / "two"), None)
    assert one.digest == two.digest
    (tmp_path / "two" / "chat_template.jinja").write_text("x")
    assert inspect_model("m", tmp_path / "two", None).digest != one.digest
