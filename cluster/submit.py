"""Submit one job to a cluster, as `ray job submit` does, and have its MLflow run say which code it ran.

    python cluster/submit.py generate_pairs --config jobs/recipes/var-d16.yaml --run s3://bucket/var-d16

The archive that Ray uploads has no .git, so the commit travels in the job's environment, with where its services are.
Credentials do not: Ray shows a job's environment to whoever sees the dashboard. They come from the nodes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOBS = ("generate_pairs", "distill", "evaluate", "ablate", "scale")
PASSED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "HF_HUB_OFFLINE")


def provenance() -> dict[str, str]:
    """Tags of the MLflow run: the commit, and whether the uploaded files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = bool(git("status", "--porcelain"))
    return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "source.changed": str(changed).lower()}


def command(job: str, arguments: list[str], tags: dict[str, str]) -> list[str]:
    """The command line of `ray job submit`; ValueError, one sentence, for what would fail on the cluster."""
    if job not in JOBS:
        raise ValueError(f"{job!r} is no job; use {', '.join(JOBS)}.")
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    if "@" in environment.get("MLFLOW_TRACKING_URI", ""):
        raise ValueError("MLFLOW_TRACKING_URI holds a password, which Ray would show; give the nodes the variable.")
    runtime = {"env_vars": environment | {"MLFLOW_RUN_CONTEXT": json.dumps(tags)}}
    submit = ["ray", "job", "submit", "--working-dir", str(ROOT)]
    submit += ["--runtime-env-json", json.dumps(runtime), "--metadata-json", json.dumps(tags)]
    return [*submit, "--", "python", f"jobs/{job}.py", *arguments]


if __name__ == "__main__":
    try:
        line = command(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:], provenance())
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    raise SystemExit(subprocess.run(line).returncode)
