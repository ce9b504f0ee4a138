"""What three jobs would miss is said before the first one begins."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults import LOGS, start
from ray.cluster_utils import Cluster
from tiny import tiny

from pipeline.command_line import DEFAULT, parse
from pipeline.host.errors import Refused
from pipeline.pairs.memory import trace_replica
from pipeline.recipe import Recipe
from pipeline.workflow import preflight
from pipeline.workflow.generate import generate
from pipeline.workflow.preflight import Job, View

pytestmark = pytest.mark.xdist_group("jobs on Ray")  # starts one of its own


@pytest.fixture
def digits(tmp_path: Path) -> Recipe:
    """The embedded default, in a folder of its own."""
    return parse(None, ["--config", str(DEFAULT), "--run", str(tmp_path / "run")])


def test_a_whole_recipe_misses_nothing_and_leaves_no_trace(digits: Recipe) -> None:
    assert preflight.findings(digits, "generate_pairs") == []
    preflight.check(digits, "generate_pairs")
    assert not Path(digits.run).exists()


@pytest.mark.faults("inputs of a later job missing")
def test_everything_that_is_missing_is_one_list(
    digits: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, LPIPS trunk, Inception, samplers: found by the first job, in the order of the jobs, each said once."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("ray.init", lambda **settings: pytest.fail("Ray was asked for"))
    settings = {"features": "inception", "inception": str(tmp_path / "none.pth"), "reference": str(tmp_path / "r.npz")}
    recipe = replace(
        digits,
        train=replace(digits.train, lpips=1.0, perceptual="vgg", split=3),
        evaluate=replace(digits.evaluate, **settings),  # type: ignore[arg-type]
    )
    with pytest.raises(Refused, match=r"^2 things are missing for the jobs of this recipe") as refused:
        generate(recipe)
    text = str(refused.value)
    for sentence in ("(1) distill: train.perceptual is vgg", "(2) evaluate: evaluate.inception", "--preflight this"):
        assert sentence in text
    gone = replace(recipe, teacher=replace(digits.teacher, checkpoint=str(tmp_path / "gone.pth")))
    assert str(preflight.findings(gone, "generate_pairs")).count("gone.pth") == 1, "of three jobs that ask for it"
    samplers = replace(digits, evaluate=replace(digits.evaluate, samplers=[{"name": "FewStep", "steps": [1, 99]}]))
    with pytest.raises(Refused, match=r"^evaluate would fail: .*end by 64"):
        generate(samplers)
    preflight.check(replace(samplers, preflight="this"), "generate_pairs")
    assert not Path(digits.run).exists()


def test_what_cannot_fit_is_refused_and_what_may_not_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(tmp_path)
    recipe = replace(recipe, cluster=replace(recipe.cluster, gpus=1, device="cpu"))
    need = trace_replica(recipe)
    bare = need.fixed + need.sample * recipe.pairs.batch
    view = View("node-1", "", (), "a card", bare - 1, False)
    with pytest.raises(Refused, match=r"pairs.batch 6 needs about .* and a card on node node-1 has .* at most 0 fit"):
        preflight.check_memory(recipe, "generate_pairs", view)
    preflight.check_memory(recipe, "generate_pairs", replace(view, memory=bare + 1))
    assert "warning: pairs.batch 6 needs about" in capsys.readouterr().err
    preflight.check_memory(recipe, "generate_pairs", replace(view, memory=need.bytes(6) + 1))
    auto = replace(recipe, pairs=replace(recipe.pairs, batch="auto"))
    preflight.check_memory(auto, "generate_pairs", replace(view, memory=need.bytes(1) + 1))
    assert capsys.readouterr().err == ""
    with pytest.raises(Refused, match=r"^pairs.batch 1 needs about .* at most 0 fit\.$"):
        preflight.check_memory(auto, "generate_pairs", replace(view, memory=need.fixed))


def test_an_evaluation_that_may_not_fit_is_warned_of_or_refused(
    digits: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused where nothing is recorded; of what recordings keep less is known."""
    samplers = [{"name": "FewStep", "steps": [1]}]
    gpus, train = replace(digits.cluster, gpus=1, device="cpu"), replace(digits.train, workers=1)
    evaluate = replace(digits.evaluate, samplers=samplers, graphs=False)
    recipe = replace(digits, cluster=gpus, train=train, evaluate=evaluate)
    need = preflight.trace_actor(recipe, preflight.plan.inputs(recipe).samplers)
    bare = need.fixed + need.sample * recipe.evaluate.batch
    view = View("node-1", "", (), "a card", bare - 1, False)
    with pytest.raises(Refused, match=r"^evaluate.batch \d+ needs about .* a card on node node-1 .* at most 0 fit\.$"):
        preflight.check_memory(recipe, "evaluate", view)
    preflight.check_memory(recipe, "evaluate", replace(view, memory=need.bytes(recipe.evaluate.batch) + 1))
    assert capsys.readouterr().err == ""
    recorded = replace(recipe, cluster=replace(gpus, device="cuda"), evaluate=replace(evaluate, graphs=True))
    preflight.check_memory(recorded, "evaluate", view)
    assert "fit. With evaluate.graphs false it needs less." in capsys.readouterr().err


@pytest.mark.parametrize(("job", "sections"), [("distill", ["train"]), ("evaluate", ["teacher", "evaluate"])])
def test_bf16_on_a_cpu_without_instructions_for_it_is_warned_of(
    digits: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: Job, sections: list[str]
) -> None:
    """And the embedded default, which runs on every laptop, does not ask for it."""
    monkeypatch.setattr(preflight.cluster, "on_one_machine", lambda recipe: True)
    monkeypatch.setattr(preflight, "emulates_bf16", lambda: True)
    for family in ("digits-llamagen", "digits-var"):
        preflight.check_workers(parse(None, ["--config", f"jobs/recipes/{family}.yaml"]), job, digits.pairs_uri)
    assert capsys.readouterr().err == ""

    low = {name: replace(getattr(digits, name), precision="bf16") for name in sections}
    preflight.check_workers(replace(digits, **low), job, digits.pairs_uri)
    said = capsys.readouterr().err
    assert [f"--{name}.precision fp32 is faster" in said for name in sections] == [True] * len(sections)
    monkeypatch.setattr(preflight, "emulates_bf16", lambda: False)
    preflight.check_workers(replace(digits, **low), job, digits.pairs_uri)
    assert capsys.readouterr().err == ""


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A head without CPUs, and a node on which a folder is another one than here: (address, the folder)."""
    folder = tmp_path / "apart"
    folder.mkdir()
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("file systems of a process's own need root")
    with tempfile.TemporaryDirectory(prefix="dd-", dir="/tmp") as temporary:
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20, "temp_dir": temporary}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray_start = f"ray start --address {cluster.address} --num-cpus 2 --object-store-memory {100 << 20} --block"
        command = ["unshare", "--mount", "bash", "-c", f"mount -t tmpfs tmpfs {folder} && exec {ray_start}"]
        tests = Path(__file__).parents[1]
        bin_ = Path(os.sys.executable).parent  # type: ignore[attr-defined]
        env = os.environ | {"PYTHONPATH": f"{tests}/support:{tests.parent}", "PATH": f"{bin_}:{os.environ['PATH']}"}
        node = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield cluster.address, folder
        node.terminate()
        node.wait(60)
        cluster.shutdown()


@pytest.mark.faults("storage: a worker has a file system of its own")
def test_a_worker_with_its_own_file_system_is_refused_before_work(apart: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = apart
    recipe = replace(tiny(tmp_path), run=str(folder / "run"))
    job = start("generate_pairs", recipe, tmp_path, address)
    assert job.wait(180) == 2
    said = [line for line in LOGS[job.pid].read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "is not the same folder on all machines" in said[0]
    assert not [path for path in folder.rglob("*") if path.is_file()], "nothing was claimed"
