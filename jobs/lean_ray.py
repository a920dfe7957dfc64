"""A Ray of one machine without what Ray 2.60 starts for dashboards and clusters, for which it has no options.

Each process left out saves one to two seconds of processor time, while a model loads on the same cores.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_idle_daemons() -> Iterator[None]:
    """Start a Ray without what has nothing to do in it: API server (no dashboard), autoscaler, log monitor (no log goes
    to the driver).

    `ray.init` waits for the first.
    """
    daemons = dict.fromkeys(("start_api_server", "start_monitor", "start_log_monitor"), _nothing)
    with _replaced("ray._private.node:Node", daemons):
        yield


@contextmanager
def without_data_actors() -> Iterator[None]:
    """Run Ray Data without three actors of its own: one collects figures for a dashboard, one shares a cluster between
    datasets, one knows on which node an actor is. Here are one dashboardless node and one dataset.
    """
    figures = dict.fromkeys(("register_dataset_to_stats_actor", "update_execution_metrics"), _nothing)
    sharing: dict[str, Callable[..., Any]] = {
        "request_resources": _nothing,
        "cancel_request": _nothing,
        "get_reserved_resources": _whole_node,
    }
    places: dict[str, Callable[..., Any]] = {
        "get_or_create_actor_location_tracker": _Unasked,
        "get_actor_locations": lambda actors: {},  # noqa: ARG005  then each is where it was
    }
    internal = "ray.data._internal"
    coordinator = f"{internal}.cluster_autoscaler.default_autoscaling_coordinator:DefaultAutoscalingCoordinator"
    with (
        _replaced(f"{internal}.stats:_StatsManager", figures),
        _replaced(coordinator, sharing),
        _replaced(f"{internal}.execution.operators.actor_pool_map_operator", places),
    ):
        yield


class _Unasked:
    """In the place of an actor that is told where others are."""

    class update_actor_location:  # noqa: N801  a method's name
        """As a method of an actor."""

        @staticmethod
        def remote(actor: str, node: str) -> None:
            """Note nothing."""


def _nothing(*arguments: Any, **options: Any) -> None:
    """Whatever Ray gives it."""


def _whole_node(*arguments: Any) -> dict[str, dict[str, float]]:  # noqa: ARG001  whoever asks
    """Node id to the resources that are the dataset's: all."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


@contextmanager
def _replaced(where: str, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace functions of `module` or `module:Class`; a Ray that doesn't have all of them is left as it is."""
    owner: Any = None
    with contextlib.suppress(ImportError, AttributeError):
        owner = pkgutil.resolve_name(where)
    if owner is None or not functions.keys() <= vars(owner).keys():
        yield
        return
    originals = {name: vars(owner)[name] for name in functions}
    for name, function in functions.items():
        setattr(owner, name, staticmethod(function) if isinstance(owner, type) else function)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(owner, name, original)
