"""The endpoint as a Ray Serve application on a warm fleet: same replica actors, no second copy of the weights.

One ingress on the cluster's head node, beside Serve's proxy and the fleet's own actor; it takes no GPU, and no CPU that
a run's stages would be waiting for. Invariant: it starts no engine and ends none.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.serve_settings import ServeSettings
from cluster.warm import HEAD, WarmFleet, describe_fleet, find_fleet
from pipeline.errors import InfrastructureError, SpecError

if TYPE_CHECKING:  # OpenAI's types take 0.4 s, which the process that starts an endpoint does without
    from cluster.batch_queue import BatchRunner, Served

APPLICATION = "tramontane"
DEPLOYMENT = "endpoint"
MAX_ONGOING = 5000
"""More than `serve_http.MAX_OPEN`, so that it is the endpoint that refuses, in OpenAI's words; Serve's default is 5."""
START_TIMEOUT_S = 120.0
START_POLL_S = 0.05
JOIN_TIMEOUT_S = 5.0


class Ingress:
    """What Serve runs: one endpoint."""

    def __init__(self, fleet: str, settings: ServeSettings, runner: BatchRunner) -> None:
        """Find the fleet and load its tokenizer; runs on Serve's event loop, before there are requests.

        Raises:
            SpecError: there is no such fleet, its model can't be had, or the batches' directory can't be used.
        """
        from cluster.serve_generation import Generation

        handle = find_fleet(fleet)
        self._settings = settings
        self._warm = describe_fleet(handle)
        self._prompts = _prompt_maker(self._warm, settings)
        self._generation = Generation(handle, settings)
        self._desk = self._open_desk(runner) if settings.batches is not None else None

    def _open_desk(self, runner: BatchRunner) -> Any:
        """The batches, those of an earlier endpoint included, which go on at once."""
        from cluster.batch_queue import BatchQueue
        from cluster.serve_batches import open_desk

        served = _served(self._warm, self._settings)
        at_once = self._settings.batches_at_once
        desk = open_desk(
            Path(str(self._settings.batches)),
            lambda records: BatchQueue(records, runner, served, at_once=at_once),
            self._settings,
        )
        self._working = desk.queue.begin()
        return desk

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application; Serve asks for it after the constructor."""
        from openai.types import Model

        from cluster.serve_api import Endpoint, make_app
        from cluster.serve_metrics import Metrics

        name = _model_name(self._warm, self._settings)
        model = Model(id=name, created=int(self._warm.started_at), object="model", owned_by=APPLICATION)
        metrics = Metrics(self._generation.replica_loads, self._warm.moe)
        return make_app(Endpoint(model, self._prompts, self._generation, metrics, self._settings, self._desk))

    async def check_health(self) -> None:
        """Raise once the fleet is gone, or batches aren't worked at; Serve then starts another ingress."""
        failures = [self._generation.failure, self._desk.queue.failure if self._desk is not None else None]
        for failure in filter(None, failures):
            raise InfrastructureError(failure)

    async def drain(self) -> bool:
        """Let nobody in any more and wait for the rest; returns whether all is done, but for batches, which go on."""
        if self._desk is None:
            return await self._generation.drain()
        done, _ = await asyncio.gather(self._generation.drain(), self._desk.queue.close())
        return done

    async def num_replicas(self) -> int:
        """Replicas of the fleet that it can send requests to."""
        return self._generation.num_replicas


def _model_name(warm: WarmFleet, settings: ServeSettings) -> str:
    return settings.model_name or warm.name


def _served(warm: WarmFleet, settings: ServeSettings) -> Served:
    import ray

    from cluster.batch_queue import Served

    return Served(
        fleet=warm.name,
        address=ray.get_runtime_context().gcs_address,
        model_name=_model_name(warm, settings),
        model=warm.model,
        captures_routing=warm.moe is not None,
        marker_text=settings.marker_text,
        request_timeout_s=settings.request_timeout_s,
        drain_timeout_s=settings.drain_timeout_s,
    )


def _prompt_maker(warm: WarmFleet, settings: ServeSettings) -> Any:
    from pathlib import Path

    from cluster.serve_prompts import PromptMaker
    from pipeline.model import fetch_model, read_config

    files = fetch_model(warm.model, weights=False)
    vocab_size = int(read_config(Path(files.path) / "config.json")["vocab_size"])
    return PromptMaker(
        str(files.path), max_model_len=warm.model.max_model_len, vocab_size=vocab_size, settings=settings
    )


def application(fleet: str, settings: ServeSettings, runner: BatchRunner) -> Any:
    """The Serve application of an endpoint on the fleet of this name; `runner` starts its batches' processes."""
    from ray import serve

    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=1,  # rate and queue limits are counted here
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        graceful_shutdown_timeout_s=settings.drain_timeout_s + 5,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )(serve.ingress()(Ingress))
    return deployment.bind(fleet, settings, runner)


def check_reach(settings: ServeSettings) -> None:
    """Refuse to be reachable from elsewhere for anybody.

    Raises:
        SpecError: the address is no loopback, and no keys are set.
    """
    if not settings.is_loopback and settings.keys is None:
        raise SpecError(
            f"host {settings.host!r} can be reached from other machines, but no API keys are set; make one with "
            "`tramontane key NAME --keys FILE` and give `--keys FILE`, or listen on 127.0.0.1"
        )


def start_endpoint(fleet: str, settings: ServeSettings, runner: BatchRunner) -> None:
    """Start the endpoint in the Ray that this process is connected to; returns when Serve says that it runs.

    Raises:
        SpecError: `check_reach`, no such fleet, or Serve runs already with another address.
        InfrastructureError: it doesn't start, or not within START_TIMEOUT_S.
    """
    from ray import serve
    from ray.exceptions import RayError

    check_reach(settings)
    find_fleet(fleet)
    _check_free()
    try:
        _start_all(application(fleet, settings, runner), settings)
    except (RayError, RuntimeError, TimeoutError) as error:
        serve.shutdown()
        raise InfrastructureError(f"the endpoint doesn't start: {_reason(error, settings)}") from error
    except BaseException:
        serve.shutdown()
        raise


def _start_all(app: Any, settings: ServeSettings) -> None:
    """Start Serve, and the application as soon as Serve's controller is there.

    Serve's proxy takes 1.1 s of a core to start and the ingress 1.9 s: one beside the other, not after it.
    """
    from ray import serve

    failures: list[Exception] = []
    starting = threading.Thread(target=_start_serve, args=(settings, failures), daemon=True)
    starting.start()
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        _wait(lambda: not starting.is_alive() or bool(serve.status().proxies), deadline)
        if not failures:
            target = serve.RunTarget(app, name=APPLICATION, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
        _wait(lambda: not starting.is_alive(), deadline)
    except BaseException:
        starting.join(JOIN_TIMEOUT_S)  # or it would start Serve's controller after Serve was shut down
        raise
    if failures:
        raise failures[0]
    # `serve.run` would wait for this too, but looks once in a second only.
    _wait(_is_running, deadline)


def _start_serve(settings: ServeSettings, failures: list[Exception]) -> None:
    from ray import serve
    from ray.serve.config import ProxyLocation

    http = {"host": settings.host, "port": settings.port, "keep_alive_timeout_s": 30}
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http)
    except Exception as error:  # noqa: BLE001  raised where it is waited for
        failures.append(error)


def _wait(condition: Callable[[], bool], deadline: float) -> None:
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {START_TIMEOUT_S:g} s; {endpoint_problem() or 'no proxy answers'}")
        time.sleep(START_POLL_S)


def _is_running() -> bool:
    from ray import serve

    found = serve.status().applications[APPLICATION]
    if found.status == "DEPLOY_FAILED":
        raise RuntimeError(found.message)
    return bool(found.status == "RUNNING")


def _reason(error: Exception, settings: ServeSettings) -> str:
    from ray.exceptions import RayError

    if not isinstance(error, RayError):
        return str(error)[:1000]
    said = str(error).strip().splitlines()[-1][:300]  # what is before it is a trace of Serve's own code
    if "Failed to bind" not in said:
        return said
    return f"port {settings.port} of {settings.host} is taken by another program; end that, or give --port"


def endpoint_problem() -> str | None:
    """What keeps the endpoint from answering, in Serve's words; None when nothing does."""
    from ray import serve

    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return "its application is gone"
    return None if found.status == "RUNNING" else f"{found.status}: {found.message[:500]}"


def end_endpoint() -> bool:
    """Drain the endpoint and end Serve; returns whether every answer was given to its end."""
    import ray
    from ray import serve

    done = False
    try:
        handle = serve.get_app_handle(APPLICATION)
        done = bool(handle.drain.remote().result())
    except (ray.exceptions.RayError, serve.exceptions.RayServeException):
        pass  # it died
    serve.shutdown()
    return done


def _check_free() -> None:
    from ray import serve

    running = serve.status()
    if running.applications or running.proxies:
        names = ", ".join(running.applications) or "none yet"
        raise SpecError(
            f"Ray Serve runs on this cluster already (applications: {names}); end it with `serve shutdown`, or serve "
            "from another cluster"
        )
