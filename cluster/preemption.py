"""On a cloud's spot node outside Kubernetes: waits for the notice that the node is taken back, and has Ray drain it.

    python -m cluster.preemption aws|gcp

Kubernetes turns the notice into a SIGTERM, which Ray understands; on a plain machine nobody does. The fleet sees a
draining node (`cluster.nodes`) and moves its replicas' work away. Runs beside Ray on every node, and costs nothing on
one that isn't spot.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

POLL_S = 5.0
_TIMEOUT_S = 3.0
_GCP_NOTICE_S = 30.0
"""Google Cloud says that, not when, a node goes: 30 s later."""

Cloud = Literal["aws", "gcp"]


@dataclass(frozen=True, slots=True)
class Metadata:
    """A cloud's metadata server, which every node reaches at the same address."""

    cloud: Cloud
    url: str = "http://169.254.169.254"

    def seconds_left(self) -> float | None:
        """Seconds until the node is taken back; None while there is no notice.

        Raises:
            OSError: the server can't be reached.
        """
        if self.cloud == "gcp":
            said = self._get("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
            return _GCP_NOTICE_S if said == "TRUE" else None
        token = self._get("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
        notice = self._get("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
        if notice is None:
            return None
        goes_at = datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        return max(0.0, (goes_at - datetime.now(UTC)).total_seconds())

    def _get(self, path: str, headers: dict[str, str], *, method: str = "GET") -> str | None:
        request = urllib.request.Request(f"{self.url}{path}", headers=headers, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise


def wait_for_notice(metadata: Metadata, *, poll_s: float = POLL_S) -> float:
    """Return the seconds left once there is a notice. A server that can't be reached is asked again."""
    while True:
        try:
            left = metadata.seconds_left()
        except (OSError, ValueError, KeyError) as error:
            print(f"metadata: {error}", file=sys.stderr, flush=True)  # noqa: T201
            left = None
        if left is not None:
            return left
        time.sleep(poll_s)


def drain_this_node(seconds_left: float) -> None:
    """Tell Ray that this node is about to go.

    What `ray drain-node` does; that command looks the node up in a way that starts a second driver.
    """
    import ray
    from ray.core.generated import autoscaler_pb2

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    context = ray.get_runtime_context()
    client = ray._raylet.GcsClient(address=context.gcs_address)
    accepted, reason = client.drain_node(
        context.get_node_id(),
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the cloud takes this node back",
        int((time.time() + seconds_left) * 1000),
    )
    print(f"draining: {accepted} {reason}", file=sys.stderr, flush=True)  # noqa: T201


def main() -> int:
    """Wait, drain, end."""
    clouds: dict[str, Cloud] = {"aws": "aws", "gcp": "gcp"}
    if len(sys.argv) != 2 or sys.argv[1] not in clouds:
        print("usage: python -m cluster.preemption aws|gcp", file=sys.stderr)  # noqa: T201
        return 2
    drain_this_node(wait_for_notice(Metadata(clouds[sys.argv[1]])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
