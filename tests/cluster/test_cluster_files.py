"""What cluster/ holds is valid, agrees with the code, and carries no secret.

Ray validates its YAML as `ray up` does first; test_kubernetes.py has the Kubernetes files, test_iam.py the policies;
the rest is checked here. Nothing is started and nothing leaves the machine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import ray
from manifests import clusters, groups, load
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.training import perceptual

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLOUDS = ("aws.yaml", "gcp.yaml")
README = (FOLDER / "README.md").read_text()
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
LOCKED: dict[str, set[str]] = {}  # the versions of each package: of some there is another for another Python
for package in LOCK["package"]:
    LOCKED.setdefault(package["name"], set()).add(package["version"])


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)  # type: ignore[union-attr]
    return made


# --- ray up


def valid(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it calls the cloud: fill in the defaults, then validate."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_accepts_the_cloud_files(name: str) -> None:
    types = valid(load(name))["available_node_types"]
    for kind in ("gpu_spot", "gpu_on_demand"):
        assert types[kind]["resources"]["GPU"] == 1


@pytest.mark.parametrize("key", ["idle_timeout", "head_node"])
def test_ray_refuses_an_unknown_key(key: str) -> None:
    with pytest.raises(Exception, match=r"idle_timeout|head_node"):
        valid(load("aws.yaml") | {key: 5})


@pytest.mark.parametrize("name", CLOUDS)
def test_gpus_scale_from_zero_and_cost_nothing_when_idle(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    head, spot, on_demand = (types[kind] for kind in ("head", "gpu_spot", "gpu_on_demand"))
    assert config["head_node_type"] == "head"
    assert 0 < config["idle_timeout_minutes"] <= 10
    assert (spot["min_workers"], on_demand["min_workers"], on_demand["max_workers"]) == (0, 0, 0)
    assert spot["max_workers"] == config["max_workers"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}, "no replica on the head"
    assert spot["resources"] == on_demand["resources"], "switching to on-demand must change nothing else"
    assert "max_workers: 0  # CHANGE to 8" in (FOLDER / name).read_text()
    assert {key: value for key, value in spot["node_config"].items() if key not in MARKET} == {
        key: value for key, value in on_demand["node_config"].items() if key not in MARKET
    }


MARKET = ("InstanceMarketOptions", "scheduling")


def test_spot_is_spot_and_on_demand_is_not() -> None:
    aws, gcp = (load(name)["available_node_types"] for name in CLOUDS)
    assert aws["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in aws["gpu_on_demand"]["node_config"]
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert gcp["gpu_spot"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert gcp["gpu_on_demand"]["node_config"]["scheduling"]["provisioningModel"] == "STANDARD"
    assert "scheduling" not in gcp["head"]["node_config"]
    assert load("aws.yaml")["provider"]["cache_stopped_nodes"] is False, "stopped nodes pay for disks"


@pytest.mark.parametrize("name", CLOUDS)
def test_clusters_ask_for_a_token_and_listen_on_loopback(name: str) -> None:
    config = load(name)
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--num-cpus=0" in start
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        store = int(re.search(r"--object-store-memory=(\d+)", commands[-1])[1])  # type: ignore[index]
        shared = next(option for option in config["docker"]["run_options"] if option.startswith("--shm-size="))
        assert store < int(shared.removeprefix("--shm-size=").removesuffix("g")) * 1e9, "the store lives in /dev/shm"


def test_credentials_of_nodes_are_roles() -> None:
    aws, gcp = (load(name)["available_node_types"] for name in CLOUDS)
    assert all(kind["node_config"]["IamInstanceProfile"] for kind in aws.values())
    head, *workers = aws.values()
    assert all(w["node_config"]["IamInstanceProfile"] != head["node_config"]["IamInstanceProfile"] for w in workers)
    assert all(gcp[kind]["node_config"]["serviceAccounts"] for kind in ("gpu_spot", "gpu_on_demand"))


# --- jobs


def test_the_job_runs_three_scripts_that_exist_on_a_recipe_that_exists() -> None:
    words = load("rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:2] == ["bash", "/app/cluster/three_jobs.sh"]
    assert (ROOT / words[words.index("--config") + 1]).is_file()
    assert "://" in words[words.index("--run") + 1], "a pod's disk ends with the pod"
    jobs = re.search(r"for job in (.*); do", (FOLDER / "three_jobs.sh").read_text())[1].split()  # type: ignore[index]
    assert jobs == ["generate_pairs", "distill", "evaluate"]
    assert all((ROOT / "jobs" / f"{job}.py").is_file() for job in jobs)


@pytest.mark.parametrize(("broken", "ran"), [("", 3), ("generate_pairs", 1), ("distill", 2)])
def test_three_jobs_stop_at_the_first_failure(tmp_path: Path, broken: str, ran: int) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "cluster").mkdir()
    shutil.copy(FOLDER / "three_jobs.sh", tmp_path / "cluster")
    for job in module("submit").JOBS:
        body = f"import sys; print('ran', sys.argv[1:]); raise SystemExit({7 if job == broken else 0})"
        (tmp_path / "jobs" / f"{job}.py").write_text(body)
    (tmp_path / "python").symlink_to(sys.executable)
    script = ["bash", str(tmp_path / "cluster/three_jobs.sh"), "--run", "a b"]
    done = subprocess.run(script, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.stdout.count("ran ['--run', 'a b']") == ran
    assert done.returncode == (7 if broken else 0)


def test_a_submission_carries_its_commit_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = module("submit")
    for name in submit.PASSED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    line = submit.command("distill", ["--run", "s3://bucket/run"], {"mlflow.source.git.commit": "abc"})
    assert line[-5:] == ["--", "python", "jobs/distill.py", "--run", "s3://bucket/run"]
    variables = json.loads(line[line.index("--runtime-env-json") + 1])["env_vars"]
    assert variables.keys() == {"MLFLOW_TRACKING_URI", "MLFLOW_RUN_CONTEXT"}
    assert json.loads(variables["MLFLOW_RUN_CONTEXT"]) == {"mlflow.source.git.commit": "abc"}
    assert "hidden" not in str(line)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.com")
    with pytest.raises(ValueError, match="password"):
        submit.command("distill", [], {})
    with pytest.raises(ValueError, match="no job; use ablate, benchmark, distill"):
        submit.command("destill", [], {})


def test_every_job_is_submitted_with_its_arguments_as_they_are() -> None:
    submit = module("submit")
    odd = ["--run", "a b", "", "{\"x\": 'y'}", "&", ";", "$HOME", "--", "-h"]
    assert submit.command("benchmark", odd, {})[-len(odd) :] == odd, "every job, arguments as they are"
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(submit.JOBS)


@pytest.mark.faults("submit: no git")
@pytest.mark.parametrize(
    ("git", "said"),
    [
        ("", "git cannot be run"),
        ("echo 'fatal: not a git repository' >&2; exit 128", "git says: fatal: not a git repository"),
        ("echo \"fatal: detected dubious ownership in repository at '/x'\" >&2; exit 128", "git says: fatal: detected"),
        ("[ $1 = status ] && exit 1; echo /", "is no checkout, but lies in that of /"),
    ],
)
def test_a_job_is_submitted_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], git: str, said: str
) -> None:
    """In a downloaded archive, in a folder of another owner, in an archive unpacked into another project's checkout."""
    submit, ran = module("submit"), []
    for name, body in {"git": git, "ray": "exit 7"}.items():
        if body:
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(submit.sys, "executable", str(tmp_path / "python"))
    run = subprocess.run
    monkeypatch.setattr(submit.subprocess, "run", lambda line, **kw: ran.append(line) or run(line, **kw))
    assert submit.main(["scale", "--run", "a b"]) == 7, "ray's own exit status"
    assert ran[-1][-5:] == ["--", "python", "jobs/scale.py", "--run", "a b"]
    assert "--metadata-json" not in ran[-1]
    error = capsys.readouterr().err
    assert error.startswith("warning: the MLflow run will not say which commit it ran; ")
    assert said in error
    assert error.count("\n") == 1


# --- make


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("folder", ["My Projects", 'it\'s "here" & $HOME; #1'])
@pytest.mark.parametrize("run", ["", "runs/my run", "/abs/it's"])
def test_make_hands_on_names_with_blanks_and_quotes(tmp_path: Path, folder: str, run: str) -> None:
    root = tmp_path / folder
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (root / ".venv/ready").touch()
    for name in ("mlflow", "python"):
        (root / f".venv/bin/{name}").write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
        (root / f".venv/bin/{name}").chmod(0o755)
    given = [f"RUN={run}", "RECIPE=my recipe's.yaml"] if run else []
    done = subprocess.run(["make", "-s", "ui", "full", *given], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    store = root / (run or "runs/demo") / "mlflow.db"
    assert f"<sqlite:///{store}>" in done.stdout.splitlines()
    recipe = "my recipe's.yaml" if run else "jobs/recipes/digits-llamagen.yaml"
    assert done.stdout.count(f"<{recipe}>") == 3


# --- image


def instructions(word: str) -> list[list[str]]:
    """Arguments of every ``word`` instruction of the Dockerfile, flags left out."""
    lines = re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()
    found = [line.split()[1:] for line in lines if line.startswith(word + " ")]
    return [[part for part in parts if not part.startswith("--")] for parts in found]


def test_the_image_copies_what_exists_and_the_context_allows() -> None:
    copied = [source for line in re.findall(r"(?m)^COPY (?!--from)(.*)$", DOCKERFILE) for source in line.split()[:-1]]
    assert {"pipeline", "jobs", "pyproject.toml"} <= set(copied)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "everything is left out but what is named"
    assert {rule[1:] for rule in rules if rule[0] == "!"} == set(copied)
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_is_built_from_the_lock() -> None:
    """Both of its steps install what uv.lock has, the same extras, beside the image's Python."""
    lines = re.findall(r"(?m)^RUN (uv .*)$", DOCKERFILE)
    synced = [(set(re.findall(r"--extra (\w+)", line)), set(re.findall(r"--(?!extra)[\w-]+", line))) for line in lines]
    (extras, first), (again, last) = synced
    assert extras == again <= PROJECT["optional-dependencies"].keys()
    assert "dev" not in extras
    assert first == {"--locked", "--inexact", "--no-install-project"}
    assert last == {"--locked", "--inexact", "--no-editable"}
    assert "ENV UV_PROJECT_ENVIRONMENT=/usr/local " in DOCKERFILE, "a login shell resets PATH"
    assert DOCKERFILE.index("COPY pyproject.toml uv.lock") < DOCKERFILE.index("RUN uv sync")
    installed = [parts for parts in instructions("RUN") if parts[:2] == ["pip", "install"]]
    assert [parts[2].partition("==")[0] for parts in installed] == ["uv", "mlflow"], "by version, beside the lock"
    assert {parts[0] for parts in instructions("FROM")} - {"scratch", "python"} == {"python:3.11-slim-bookworm"}


def test_the_image_has_the_versions_of_the_project() -> None:
    mlflow = re.search(r"mlflow==([\d.]+)", DOCKERFILE)[1]  # type: ignore[index]
    assert {mlflow} == LOCKED["mlflow"], "the server is the version that the jobs have"
    assert mlflow == importlib.metadata.version("mlflow"), "and were tested with"
    assert {load("raycluster.yaml")["spec"]["rayVersion"]} == LOCKED["ray"] == {ray.__version__}
    assert "3.11" in PROJECT["requires-python"]


# --- uv.lock


def test_the_lock_is_that_of_pyproject() -> None:
    """What uv wrote down of pyproject.toml is what stands there; `uv lock` brings it up to date."""
    (own,) = (package for package in LOCK["package"] if package["name"] == PROJECT["name"])
    asked = {("", text) for text in PROJECT["dependencies"]}
    asked |= {(extra, text) for extra, texts in PROJECT["optional-dependencies"].items() for text in texts}
    wanted: Counter[tuple[str, str, str]] = Counter()
    for extra, text in asked:
        requirement = Requirement(text)
        wanted[extra, requirement.name.lower().replace("_", "-"), str(requirement.specifier)] += 1
    found: Counter[tuple[str, str, str]] = Counter()
    for line in own["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '(\w+)'", line.get("marker", ""))
        found[extra[1] if extra else "", line["name"], str(SpecifierSet(line.get("specifier", "")))] += 1
    assert found == wanted
    assert set(own["metadata"]["provides-extras"]) == PROJECT["optional-dependencies"].keys()
    assert LOCK["requires-python"] == PROJECT["requires-python"]


def test_the_lock_is_for_everybody() -> None:
    """Every package is PyPI's, with hashes; nothing in it is of the machine on which it was made."""
    for package in LOCK["package"]:
        if package["name"] == PROJECT["name"]:
            assert package["source"] == {"editable": "."}
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}, package["name"]
        for file in [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]:
            assert file["url"].startswith("https://files.pythonhosted.org/")
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", file["hash"])
    assert LOCKED["torch"] == {"2.13.0"}, "not a +cpu of somewhere else"


def test_the_image_has_the_trunk_that_training_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ((source, target),) = instructions("ADD")
    name = perceptual.TRUNKS["vgg"]
    assert source == f"https://download.pytorch.org/models/{name}"
    assert target == f"/hub/checkpoints/{name}"
    checksum = re.search(r"--checksum=sha256:([0-9a-f]{64})", DOCKERFILE)[1]  # type: ignore[index]
    assert checksum.startswith(name.removesuffix(".pth").rsplit("-", 1)[1])
    home = re.search(r"ENV TORCH_HOME=(\S+)", DOCKERFILE)[1]  # type: ignore[index]
    assert f"COPY --from=trunk / {home}" in DOCKERFILE
    monkeypatch.setenv("TORCH_HOME", home)
    with pytest.raises(ValueError, match=re.escape(home + target)):
        perceptual.trunk_file("vgg")  # looks where the image puts it


def test_images_run_as_a_user_that_ray_up_can_find() -> None:
    stages = re.split(r"(?m)^FROM ", DOCKERFILE)[1:]
    for stage in stages:
        name = stage.split("\n")[0].split()[-1]
        if name in ("node", "mlflow"):
            users = re.findall(r"(?m)^USER (\S+)", stage)
            assert users, f"{name} runs as root"
            assert users[-1] != "root"
    assert "HOME=/home/ray" in DOCKERFILE, "Ray reads it from the image's environment and takes /root without it"


def test_every_cluster_runs_the_same_image() -> None:
    images = {load(name)["docker"]["image"] for name in CLOUDS}
    for _, spec in clusters():
        images |= {group["template"]["spec"]["containers"][0]["image"] for group in groups(spec)}
    (image,) = images
    assert image.rsplit(":", 1)[1] == PROJECT["version"]


# --- MLflow


def test_mlflow_is_on_loopback_with_a_password_of_yours() -> None:
    services = load("mlflow.yaml")["services"]
    assert services["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]
    assert "ports" not in services["database"]
    required = re.compile(r"\$\{[A-Z_]+:\?[^}]+\}")  # no default: compose stops where it is not set
    assert required.fullmatch(services["database"]["environment"]["POSTGRES_PASSWORD"])
    assert required.fullmatch(services["mlflow"]["environment"]["PGPASSWORD"])
    for name, value in services["mlflow"]["environment"].items():
        assert value is None or name in ("PGPASSWORD", "MLFLOW_DISABLE_TELEMETRY"), "handed on from the shell"
    assert services["mlflow"]["build"]["target"] in re.findall(r"(?m)^FROM \S+ AS (\S+)", DOCKERFILE)
    assert (FOLDER / services["mlflow"]["build"]["context"] / services["mlflow"]["build"]["dockerfile"]).is_file()
    uri = next(flag for flag in services["mlflow"]["command"] if flag.startswith("--backend-store-uri="))
    assert "@database:5432/" in uri
    assert uri.partition("+")[2].partition(":")[0] + "-binary==" in DOCKERFILE, "the driver, by name and installed"
    assert ":" not in uri.partition("://")[2].partition("@")[0], "a password in a command line shows in `ps`"


def mlflow_flags() -> set[str]:
    from mlflow.cli import server

    return {name for option in server.params for name in (*option.opts, *option.secondary_opts)}


def test_mlflow_knows_the_flags_of_the_file_and_of_the_readme() -> None:
    known = mlflow_flags()
    given = {word.split("=")[0] for word in load("mlflow.yaml")["services"]["mlflow"]["command"] if word[0] == "-"}
    for command in re.findall(r"mlflow server ((?:[^\n\\']|\\\n)*)", README):
        given |= {word.split("=")[0] for word in command.split() if word.startswith("--")}
    assert {"--backend-store-uri", "--artifacts-destination", "--allowed-hosts", "--host"} <= given <= known


# --- secrets and addresses

SECRETS = {
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "token of a hub": r"\b(?:hf|ghp|gho|glpat|sk|xox[abp])[_-][0-9A-Za-z_-]{16,}\b",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\"private_key\"",
    "password in a URI": r"://[^/\s:@{$]+:[^/\s@{$]+@",
    "literal": r"(?i)\b[a-z_]*(?:password|secret|token|access_key)[a-z_]*[ \t]*[:=][ \t]*[\"']?[0-9a-z+/_-]{12,}",
}
NOT_SECRET = {
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
}


def secrets_in(text: str) -> list[str]:
    found = [f"{kind}: {hit}" for kind, pattern in SECRETS.items() for hit in re.findall(pattern, text)]
    long = set(re.findall(r"\b(?:[0-9a-f]{32,}|[0-9A-Za-z+/]{40,}={0,2})(?![0-9A-Za-z/.-])", text)) - NOT_SECRET
    return found + [f"looks random: {hit}" for hit in long if re.search(r"\d", hit) and re.search(r"[A-Fa-f]", hit)]


def cluster_files() -> list[Path]:
    return [path for path in sorted(FOLDER.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("path", [*cluster_files(), ROOT / ".rayignore", ROOT / ".dockerignore"], ids=lambda p: p.name)
def test_no_file_holds_a_secret_or_a_path_of_somebodys_machine(path: Path) -> None:
    text = path.read_text()
    assert secrets_in(text) == []
    assert re.findall(r"/(?:work|root|Users)/\S*|/home/(?!ray\b|mlflow\b)\S+", text) == []


@pytest.mark.parametrize(
    "line",
    [
        "aws_access_key_id: AKIA" + "ABCDEFGHIJKLMNOP",
        "HF_TOKEN: hf_" + "abcdefghijklmnopqrstuvwxyz",
        "password: " + "correcthorsebattery",
        "postgresql://mlflow:" + "hunter2@database/mlflow",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "auth: " + "0123456789abcdef" * 4,
    ],
)
def test_the_scan_sees_a_secret(line: str) -> None:
    assert secrets_in(line)


def test_nothing_but_the_container_of_mlflow_listens_everywhere() -> None:
    for path in cluster_files():
        lines = [line for line in path.read_text().splitlines() if "0.0.0.0" in line]
        assert len(lines) == (1 if path.name == "mlflow.yaml" else 0), path.name
    assert not re.search(r"--(?:dashboard-)?host[= ](?!127\.0\.0\.1)", README)


# --- the archive of a submitted job


def archive(folder: Path, out: Path) -> dict[str, int]:
    """Name -> size of what `ray job submit --working-dir folder` uploads, by Ray's own packaging."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(str(folder), out, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(out) as package:
        return {item.filename: item.file_size for item in package.infolist()}


def test_a_submitted_job_uploads_the_code_and_little_else(tmp_path: Path) -> None:
    names = archive(ROOT, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < 20e6
    assert {"pipeline/recipe.py", "jobs/distill.py", "jobs/recipes/var-d16.yaml"} <= names.keys()
    assert any(name.startswith("pipeline/assets/digits/") for name in names)
    assert {name.split("/")[0] for name in names if "/" in name} == {"pipeline", "jobs", "cluster"}


def test_data_and_credentials_stay_at_home(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, project)
    planted = [
        ".env", ".env.local", "cluster/key.pem", "jobs/server.key", ".aws/credentials", "credentials.json",
        ".ray/auth_token", ".config/gcloud/application_default_credentials.json", "runs/demo/pairs/shard-00000.parquet",
        "pairs/shard-00000.parquet", "tests/test_x.py", "weights/inception.pth", "var_d16.pth", "student.safetensors",
        "mlruns/0/meta.yaml", "mlflow.db", ".git/config", ".venv/bin/python", "pipeline/__pycache__/x.pyc",
    ]  # fmt: skip
    for name in [*planted, "pipeline/recipe.py", "pipeline/assets/digits/scorer.safetensors"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    names = {name for name, size in archive(project, tmp_path / "package.zip").items() if size}
    assert names & set(planted) == set()
    assert {"pipeline/recipe.py", "pipeline/assets/digits/scorer.safetensors"} <= names


# --- README.md


def commands() -> list[str]:
    """Shell commands of the README, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines() if line and line[0] != "#"]


def test_commands_of_the_readme_name_files_that_exist() -> None:
    named = {match for line in commands() for match in re.findall(r"(?<![\w/.:~-])(?:cluster|jobs)/[\w./-]+", line)}
    assert {"cluster/aws.yaml", "cluster/gcp.yaml", "cluster/rayjob.yaml", "cluster/submit.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [link for link in links if not (FOLDER / link).exists()] == []


def test_the_readme_speaks_of_every_file_and_every_variable_that_the_code_reads() -> None:
    assert [path.name for path in cluster_files() if path.name not in README and path.name != "README.md"] == []
    code = "\n".join(path.read_text() for folder in ("pipeline", "jobs") for path in (ROOT / folder).rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get)?[\[(]\"([A-Z_]+)\"", code))
    read |= set(re.findall(r"\"([A-Z_]+)\" (?:not )?in os\.environ", code)) | set(module("submit").PASSED)
    assert {"MLFLOW_TRACKING_URI", "RAY_ADDRESS", "XDG_CACHE_HOME", "TORCH_HOME"} <= read
    table = README.partition("## Environment variables")[2].partition("\n## ")[0]
    assert [name for name in sorted(read) if f"`{name}`" not in table] == []


def test_the_readme_says_what_was_not_run() -> None:
    assert "validated by schema, not run" in README.lower()
