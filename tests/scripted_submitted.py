"""A submitted job with scripted engines: `jobs.submitted` but for the pools, which $SCRIPTED_ENGINES describes.

On the cluster it stands for DRIVER_MODULE; on the client, `python -m tests.scripted_submitted tramontane ...` is the
command line that names it so.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import jobs.submission
import jobs.submitted
from jobs.engines import Engines
from jobs.main import main
from jobs.prepare import PreparedJob
from tests.scripted_driver import scripted_pools


def _with_scripted_engines() -> None:
    import jobs.run

    with open(os.environ["SCRIPTED_ENGINES"]) as file:
        pools = scripted_pools(json.load(file))
    engines_of = jobs.run.engines_of

    def scripted_engines(job: PreparedJob, **options: Any) -> Engines:
        return engines_of(job, **{**options, "pools": pools})

    jobs.run.engines_of = scripted_engines
    print(f"code from {jobs.__path__[0]}", flush=True)
    main(jobs.submitted.run_submitted)


if __name__ == "__main__":
    if sys.argv[1] == "tramontane":
        sys.argv = ["tramontane", *sys.argv[2:]]
        jobs.submission.DRIVER_MODULE = "tests.scripted_submitted"
        main()
    else:
        _with_scripted_engines()
