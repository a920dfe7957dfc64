"""Mixtral 8x7B's real dimensions with dummy weights on one replica: tokens per second, and their share of the roofline.

    python -m tests.gpu.measure_mixtral --gpu H200                   one H200, bf16
    python -m tests.gpu.measure_mixtral --gpu H100-80G --tensor-parallel 2
    python -m tests.gpu.measure_mixtral --gpu cpu --layers 2 --hidden 1024 --requests 32    does the script itself work

Uses the pipeline's own engine adapter, so routing capture is on as in a run (`--no-routing` for the difference). A
short and a long run are timed and subtracted, so that start-up and warm-up cancel. One JSON line per measurement.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.gpus import gpu_type
from cluster.model_size import model_size
from cluster.precision import model_precision
from cluster.roofline import Engine, decode_step
from pipeline.engine import MoeShape, Request
from pipeline.model import cache_directory, moe_shape
from pipeline.settings import SamplingSettings
from pipeline.tiny_mixtral import ensure_random_mixtral
from pipeline.vllm_engine import VllmEngine, VllmEngineConfig
from tests.cluster.real_configs import MIXTRAL_8X7B


def write_model(folder: Path, *, layers: int, hidden: int) -> dict[str, Any]:
    """A model directory without weights: Mixtral's config, its real tokenizer; returns the config."""
    tiny = ensure_random_mixtral(cache_directory())
    for file in tiny.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, folder / file.name)
    scale = hidden / MIXTRAL_8X7B["hidden_size"]
    config = {
        **json.loads((tiny / "config.json").read_text()),
        **MIXTRAL_8X7B,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": int(MIXTRAL_8X7B["intermediate_size"] * scale),
        "head_dim": hidden // MIXTRAL_8X7B["num_attention_heads"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return config


def generate(engine: VllmEngine, num_requests: int, *, prompt_tokens: int, output_tokens: int, name: str) -> float:
    """Run requests of random ids to their full length, the engine always full; returns the seconds it took."""
    rng = random.Random(1)
    sampling = SamplingSettings(
        temperature=1.0, max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True, seed=1
    )
    began = time.perf_counter()
    for n in range(num_requests):
        ids = [1, *(rng.randrange(3, 32_000) for _ in range(prompt_tokens - 1))]
        engine.add(Request(f"{name}/{n}", ids, sampling, None))
    done = 0
    while done < num_requests:
        done += len(engine.step())
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model and return the figures."""
    with tempfile.TemporaryDirectory(prefix="mixtral-") as folder:
        config = write_model(Path(folder), layers=arguments.layers, hidden=arguments.hidden)
        moe: MoeShape | None = None if arguments.no_routing else moe_shape(config)
        engine_args: dict[str, Any] = {"load_format": "dummy", "max_num_seqs": arguments.sequences}
        if arguments.quantization:
            engine_args["quantization"] = arguments.quantization
        began = time.perf_counter()
        engine = VllmEngineConfig(
            model_path=folder,
            dtype="bfloat16",
            max_model_len=2048,
            moe=moe,
            tensor_parallel=arguments.tensor_parallel,
            on_cpu=arguments.gpu == "cpu",
            engine_args=engine_args,
        ).build()
        load_s = time.perf_counter() - began
        shape = {"prompt_tokens": arguments.prompt_tokens, "output_tokens": arguments.output_tokens}
        generate(engine, arguments.sequences // 4, **shape, name="warm-up")
        short = generate(engine, arguments.requests, **shape, name="short")
        long = generate(engine, 3 * arguments.requests, **shape, name="long")
        engine.close()
    rate = 2 * arguments.requests * arguments.output_tokens / (long - short)
    precision = model_precision(config, dtype="bfloat16", engine_args=engine_args)
    ideal = decode_step(
        Engine(model_size(config), gpu_type(arguments.gpu), arguments.tensor_parallel, precision),
        batch=arguments.sequences,
        context=arguments.prompt_tokens + arguments.output_tokens / 2,
    ).tokens_per_s
    return {
        "gpu": arguments.gpu,
        "tensor_parallel": arguments.tensor_parallel,
        "layers": arguments.layers,
        "routing": moe is not None,
        "quantization": arguments.quantization,
        "sequences": arguments.sequences,
        "load_s": round(load_s, 1),
        "output_tokens_per_s": round(rate, 1),
        "ideal_decode_tokens_per_s": round(ideal, 1),
        "share_of_ideal": round(rate / ideal, 3),
        "versions": engine.info.versions,
    }


def main() -> None:
    """Measure once, print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="H200", help="type in cluster/gpus.py, for the roofline")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--layers", type=int, default=MIXTRAL_8X7B["num_hidden_layers"])
    parser.add_argument("--hidden", type=int, default=MIXTRAL_8X7B["hidden_size"])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--requests", type=int, default=512, help="of the short run; the long one has three times")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--quantization", default=None, help="e.g. fp8, made of the dummy weights at load")
    parser.add_argument("--no-routing", action="store_true")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
