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

ROOT = Path(__file__).resolve().parents[1]
JOBS = tuple(sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
PASSED = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "HF_HUB_OFFLINE")


def provenance() -> dict[str, str]:
    """Tags of the MLflow run: the commit, and whether the uploaded files differ from it.

    Empty, after a word on stderr, where git cannot say: in a downloaded archive, in another owner's folder, without it.
    """

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True)
        return found.stdout.decode(errors="replace").strip()

    try:
        top = git("rev-parse", "--show-toplevel")
        if Path(top).resolve() != ROOT:
            return _without(f"{ROOT} is no checkout, but lies in that of {top}")
        changed = bool(git("status", "--porcelain"))
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "source.changed": str(changed).lower()}
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode(errors="replace").split())
        return _without(f"git says: {said or error}")
    except OSError as error:
        return _without(f"git cannot be run ({error})")


def _without(reason: str) -> dict[str, str]:
    print(f"warning: the MLflow run will not say which commit it ran; {reason}", file=sys.stderr)
    return {}


def command(job: str, arguments: list[str], tags: dict[str, str]) -> list[str]:
    """The command line of `ray job submit`; ValueError, one sentence, for what would fail on the cluster."""
    if job not in JOBS:
        raise ValueError(f"{job!r} is no job; use {', '.join(JOBS)}.")
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    if "@" in environment.get("MLFLOW_TRACKING_URI", ""):
        raise ValueError("MLFLOW_TRACKING_URI holds a password, which Ray would show; give the nodes the variable.")
    environment |= {"MLFLOW_RUN_CONTEXT": json.dumps(tags)} if tags else {}
    submit = ["ray", "job", "submit", "--working-dir", str(ROOT)]
    submit += ["--runtime-env-json", json.dumps({"env_vars": environment})]
    submit += ["--metadata-json", json.dumps(tags)] if tags else []
    return [*submit, "--", "python", f"jobs/{job}.py", *arguments]


def main(arguments: list[str]) -> int:
    """The exit status of `ray job submit`; 2 where there is nothing to submit."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nJobs: {', '.join(JOBS)}")
        return 0 if arguments else 2
    # The environment of this very Python has Ray, whether or not it is on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        line = command(arguments[0], arguments[1:], provenance())
        return subprocess.run(line).returncode
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
