"""Finds a model's files: made on the spot, local, in object storage, or on the Hugging Face hub.

Knows a model only by its files: JSON config, tokenizer, safetensors. Never runs code from a model's repository and
never loads pickled weights. Imports no ML library, so that validation and planning stay quick.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.engine import MoeShape
from pipeline.errors import InfrastructureError, SpecError
from pipeline.settings import RANDOM, TINY, ModelSettings
from pipeline.storage import filesystem, split_url

TOKENIZER_FILES = ("tokenizer.json", "*.model", "tekken.json", "vocab.json")
"""One of them holds a tokenizer's vocabulary."""
# Files worth fetching. Pickled weights (*.bin, *.pt, *.pth) are not among them.
WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "tokenizer*")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disk."""

    source: str
    """As the spec names it."""
    path: str
    """Directory the engine loads."""
    revision: str | None
    """Commit of a hub repository; None elsewhere."""
    architecture: str
    moe: MoeShape | None
    """None for a dense model."""
    context_length: int | None
    """Tokens of prompt and completion together that the model was made for; None where its config doesn't say."""
    digest: str
    """Covers config, tokenizer, template, and the names and sizes of the weight files: what decides the results."""

    def describe(self) -> dict[str, Any]:
        """The `model` entry of `summary.json`."""
        moe = self.moe
        return {
            "source": self.source,
            "path": self.path,
            "revision": self.revision,
            "architecture": self.architecture,
            "layers": moe.num_layers if moe else None,
            "experts": moe.num_experts if moe else None,
            "top_k": moe.top_k if moe else None,
            "digest": self.digest,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the run's own files."""
        return asdict(self)


def cache_directory() -> Path:
    """Where fetched and made models live: $TRAMONTANE_CACHE, else ~/.cache/tramontane."""
    return Path(os.environ.get("TRAMONTANE_CACHE") or Path.home() / ".cache" / "tramontane") / "models"


def fetch_model(settings: ModelSettings, *, weights: bool = True) -> ModelFiles:
    """Return the model's files on this machine, making or downloading what isn't there yet.

    Without `weights` only config and tokenizer are downloaded, a few MB; the digest is the same.

    Raises:
        SpecError: the source doesn't exist, has no config or no safetensors, or needs remote code.
    """
    source = settings.source
    if source in (TINY, RANDOM):
        from pipeline.tiny_mixtral import ensure_random_mixtral, ensure_tiny_mixtral

        made = (ensure_tiny_mixtral if source == TINY else ensure_random_mixtral)(cache_directory())
        return inspect_model(source, made, None, version=made.name)
    scheme, _ = split_url(source)
    if scheme != "file":
        path = _download(source, weights=weights)
        return inspect_model(source, path, None, version=path.name, weights=weights)
    local = Path(split_url(source)[1]).expanduser()
    if local.is_dir():
        return inspect_model(source, local.resolve(), None, version=_weights_version(local))
    return _from_hub(source, settings.revision, weights=weights)


def inspect_model(
    source: str, path: Path, revision: str | None, *, version: str = "", weights: bool = True
) -> ModelFiles:
    """Read what a model directory says of itself; `version` stands for the content of its weights.

    Raises:
        SpecError: not a model directory, pickled weights only, no tokenizer, or code of its own.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise SpecError(
            f"model.source {source!r}: {path} holds no config.json; give a directory of a Hugging Face model"
        )
    config = read_config(config_file)
    if "auto_map" in config:
        raise SpecError(
            f"model.source {source!r} wants to run code of its own (auto_map in config.json), which is never done; "
            "use a model that transformers and vLLM implement themselves"
        )
    if weights and not any(path.glob("*.safetensors")):
        raise SpecError(
            f"model.source {source!r}: no *.safetensors in {path}; convert the weights, pickled ones are refused"
        )
    if not any(name for pattern in TOKENIZER_FILES for name in path.glob(pattern)):
        raise SpecError(
            f"model.source {source!r}: no tokenizer in {path}, without which no engine starts; add the model's "
            "tokenizer.json to its directory"
        )
    return ModelFiles(
        source=source,
        path=str(path),
        revision=revision,
        architecture=(config.get("architectures") or ["unknown"])[0],
        moe=moe_shape(config),
        context_length=context_length(config),
        digest=_digest(path, version),
    )


def read_config(file: Path) -> dict[str, Any]:
    """Return a model's `config.json`.

    Raises:
        SpecError: it is no JSON object.
    """
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise SpecError(f"{file} is not JSON ({error}); download the model again") from error
    if not isinstance(config, dict):
        raise SpecError(f"{file} holds no JSON object; download the model again")
    return config


def moe_shape(config: dict[str, Any]) -> MoeShape | None:
    """Read layers, experts and top-k out of a Hugging Face config; None for a dense model.

    The field names are those of Mixtral, Qwen-MoE, DeepSeek, OLMoE, Phi-MoE, DBRX and gpt-oss configs.
    """
    text = _text_config(config)
    experts = _first(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    top_k = _first(text, "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk")
    layers = len(routing_layers(config))
    if not experts or experts < 2 or not top_k or not layers:
        return None
    return MoeShape(num_layers=layers, num_experts=experts, top_k=top_k)


def routing_layers(config: dict[str, Any]) -> list[int]:
    """Indices of the layers that have a router, were it a mixture of experts: all, but for those declared dense.

    Qwen-MoE names dense layers and a step, DeepSeek and GLM a number of first ones, Llama 4 the layers that route. Our
    layers are numbered among those that route: DeepSeek-V3's layer 3 is layer 0 in all statistics.
    """
    text = _text_config(config)
    named = text.get("moe_layers") or range(_first(text, "num_hidden_layers", "n_layers") or 0)
    dense = set(text.get("mlp_only_layers") or ())
    first = _first(text, "first_k_dense_replace") or 0
    step = _first(text, "decoder_sparse_step") or 1
    return [layer for layer in named if layer >= first and layer not in dense and (layer + 1) % step == 0]


def context_length(config: dict[str, Any]) -> int | None:
    """`max_position_embeddings`, which vLLM won't exceed; None where it multiplies it (scaled rotary embeddings)."""
    text = _text_config(config)
    scaling = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default" or "factor" in scaling:
        return None
    return _first(text, "max_position_embeddings")


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's own settings, wherever they are nested."""
    return {**config, **(config.get("text_config") or {}), **(config.get("ffn_config") or {})}


def _first(config: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _digest(path: Path, version: str) -> str:
    digest = hashlib.sha256(f"{version}\n".encode())
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") or file.name.startswith("tokenizer"):
            digest.update(f"{file.name}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _weights_version(path: Path) -> str:
    """Names, sizes and modification times: checkpoints of one model all have the same size."""
    files = [(file.name, file.stat()) for file in sorted(path.glob("*.safetensors"))]
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])


def _download(url: str, *, weights: bool) -> Path:
    """Mirror the wanted files of an object-store directory into the cache, once per content listing."""
    import fnmatch

    fs = filesystem(url)
    root = split_url(url)[1].rstrip("/")
    try:
        listing = [entry for entry in fs.ls(root, detail=True) if entry["type"] == "file"]
    except FileNotFoundError:
        raise SpecError(f"model.source {url!r} does not exist") from None
    wanted = {
        entry["name"].rsplit("/", 1)[-1]: entry
        for entry in listing
        if any(fnmatch.fnmatch(entry["name"].rsplit("/", 1)[-1], pattern) for pattern in WANTED_FILES)
    }
    if not wanted:
        raise SpecError(f"model.source {url!r} holds none of {', '.join(WANTED_FILES)}")
    key = json.dumps([url, [(n, e["size"], str(e.get("ETag") or e.get("etag"))) for n, e in sorted(wanted.items())]])
    target = cache_directory() / f"url-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    target.mkdir(parents=True, exist_ok=True)
    for name, entry in wanted.items():
        if name.endswith(".safetensors") and not weights:
            continue
        file = target / name
        if not file.exists() or file.stat().st_size != entry["size"]:
            temporary = target / f".{name}.{os.getpid()}.tmp"
            fs.get_file(entry["name"], str(temporary))
            temporary.replace(file)
    return target


def _from_hub(source: str, revision: str | None, *, weights: bool) -> ModelFiles:
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise SpecError(
            f"model.source {source!r} is no directory on this machine; give `tiny`, `random`, a directory, an s3:// "
            "(gs://, abfs://) URL or a Hugging Face id such as mistralai/Mixtral-8x7B-Instruct-v0.1"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        patterns = [pattern for pattern in WANTED_FILES if weights or pattern != "*.safetensors"]
        path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise InfrastructureError(
            f"model.source {source!r} is neither a local directory nor cached, and the Hugging Face hub can't be "
            f"reached ({type(error).__name__}); check the name, or copy the model to a directory and give its path"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise SpecError(f"model.source {source!r}: {error}") from error
    except (HfHubHTTPError, OSError) as error:
        raise InfrastructureError(f"model.source {source!r} could not be downloaded: {error}; try again") from error
    return inspect_model(source, path, path.name, version=path.name, weights=weights)
