"""The Ray that a run starts for itself."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json
from jobs.ray_session import local_ray

if __name__ == "__main__":
    with local_ray():
        import ray
        from ray._raylet import AuthenticationMode, get_authentication_mode
        with local_ray():
            address = ray.get_runtime_context().gcs_address
        facts = {"token": get_authentication_mode() == AuthenticationMode.TOKEN,
                 "kept": ray.get_runtime_context().gcs_address == address,
                 "cpus": ray.cluster_resources()["CPU"]}
    print(json.dumps(facts | {"gone": not ray.is_initialized()}))
"""


def test_a_local_ray_is_its_own_quiet_authenticated_and_gone_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=90, check=True)
    facts = json.loads(done.stdout)
    assert facts["cpus"] >= 4
    assert {name: facts[name] for name in ("token", "kept", "gone")} == {"token": True, "kept": True, "gone": True}
    assert done.stderr == ""
