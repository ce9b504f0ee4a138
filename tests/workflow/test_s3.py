"""Files and the three jobs on a real S3 server (SeaweedFS), which sometimes fails."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import s3server
import tiny
import torch
from s3server import BUCKET, READER, READER_SECRET, SECRET, Relay, client, every
from safetensors.torch import load_file

from pipeline import command_line, noise, storage
from pipeline.command_line import parse
from pipeline.evaluation import timing
from pipeline.files import places
from pipeline.host.errors import Outage, Refused
from pipeline.pairs import commits, completion, manifest, passes
from pipeline.pairs import shards as pairs
from pipeline.pairs.facts import PairFacts
from pipeline.pairs.manifest import Gap
from pipeline.pairs.replica import Replica
from pipeline.pairs.rows import Rows
from pipeline.recipe import Recipe
from pipeline.services import cluster, tracking
from pipeline.services.heartbeat import Heartbeat
from pipeline.training.observer import Observer
from pipeline.workflow import drawing
from pipeline.workflow.distill import distill
from pipeline.workflow.evaluate import evaluate as evaluate_job
from pipeline.workflow.generate import generate as generate_job

FAULTS = ["slow down", "break upload", "lose answer", "break download"]
PART = 5 << 20  # bytes of a part of an upload, the smallest that S3 takes; s3fs has 50 MB
MEGABYTE = 1 << 20
READ_ONLY = {"AWS_ACCESS_KEY_ID": READER, "AWS_SECRET_ACCESS_KEY": READER_SECRET}
REFUSED = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}  # a port that nobody listens on


@pytest.fixture
def folder(s3_server: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder in the bucket; downloads are kept in the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What s3fs does with files above 50 and 100 MB, it does with small ones."""
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, chunksize=None: PART)
    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", PART)
    with client():
        yield


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As many attempts as show that there are several: 1 of botocore's and 2 of s3fs's, not 5 and 5."""
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    with client(AWS_MAX_ATTEMPTS="1"):
        yield


def replaced(uri: str, data: bytes) -> None:
    with storage.replacing(uri) as file:
        file.write(data)


# ---- files


def test_write_read_list_remove(folder: str) -> None:
    assert storage.listing(folder) == []
    storage.write_bytes(f"{folder}/b.bin", b"two")
    storage.write_json(f"{folder}/a.json", {"x": [1]})
    storage.write_bytes(f"{folder}/inside/c.bin", b"three")
    assert storage.listing(folder) == ["a.json", "b.bin", "inside"]
    assert storage.read_json(f"{folder}/a.json") == {"x": [1]}
    assert storage.exists(f"{folder}/b.bin")
    with storage.reading(f"{folder}/inside/c.bin") as file:
        file.seek(2)
        assert file.read() == b"ree"
    storage.remove(f"{folder}/b.bin")
    storage.remove(f"{folder}/b.bin")
    assert not storage.exists(f"{folder}/b.bin")
    storage.check_writable(folder, needed=10**15)
    assert storage.listing(folder) == ["a.json", "inside"], "the probe is gone"
    with pytest.raises(FileNotFoundError, match=f"{folder}/no.json could not be read: there is no such file"):
        storage.read_json(f"{folder}/no.json")


def test_a_page_is_shown_and_not_downloaded(folder: str) -> None:
    storage.write_bytes(f"{folder}/report.html", b"<p>")
    storage.write_json(f"{folder}/report.json", {})
    fs, path = storage.filesystem(folder)
    assert fs.info(f"{path}/report.html", refresh=True)["ContentType"] == "text/html; charset=utf-8"
    assert fs.info(f"{path}/report.json", refresh=True)["ContentType"] == "application/json"


def test_a_listing_of_more_than_a_page(folder: str, s3_server: Relay) -> None:
    """A page has 1,000 names."""
    names = [f"shard-{k:05d}.parquet" for k in range(1003)]
    s3_server.create(folder, names)
    with s3_server.counting() as requests:
        assert storage.listing(folder) == names
    assert [method for method, _ in requests] == ["GET", "GET"]


def test_a_large_file_goes_up_in_parts(folder: str, s3_server: Relay) -> None:
    data = os.urandom(101 * MEGABYTE)  # from twice its 50 MB on, s3fs cuts
    storage.write_bytes(f"{folder}/large.bin", b"old")
    fs, path = storage.filesystem(folder)
    with client(AWS_ENDPOINT_URL=s3_server.direct):
        with storage.replacing(f"{folder}/large.bin") as file:
            file.write(data)
            file.flush()
            assert storage.read_bytes(f"{folder}/large.bin") == b"old", "it appears when it is whole"
        assert storage.read_bytes(f"{folder}/large.bin") == data
    assert fs.info(f"{path}/large.bin")["ETag"].endswith('-3"'), "three parts"
    with pytest.raises(RuntimeError, match="halfway"), storage.replacing(f"{folder}/large.bin") as file:
        raise RuntimeError("halfway")
    assert fs.info(f"{path}/large.bin")["size"] == len(data)


def test_a_file_is_downloaded_once(folder: str, s3_server: Relay, tmp_path: Path) -> None:
    uri = f"{folder}/weights.bin"
    storage.write_bytes(uri, b"first")
    digest = hashlib.sha256(b"first").hexdigest()
    assert storage.sha256(uri) == digest
    storage.listing(folder)  # which tells of the same file in other words
    with s3_server.counting() as requests:
        assert storage.sha256(uri) == digest
        assert storage.local(uri).read_bytes() == b"first"
        assert storage.read_bytes(uri) == b"first"
    assert [method for method, _ in requests] == ["HEAD", "HEAD", "GET"], "only what is not to be kept was fetched"
    storage.listing(folder)
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(uri, b"second")  # as another process would
    assert storage.local(uri).read_bytes() == b"second"


# ---- trouble that passes


@pytest.mark.faults("S3: slow-downs, broken transfers, lost answers")
@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_now_and_then_changes_no_byte(folder: str, s3_server: Relay, fault: str) -> None:
    data = os.urandom(12 * MEGABYTE)
    with s3_server.failing(every(3, fault)), s3_server.counting() as requests:
        replaced(f"{folder}/large.bin", data)
        storage.write_bytes(f"{folder}/small.bin", data[:MEGABYTE])
        assert storage.read_bytes(f"{folder}/small.bin") == data[:MEGABYTE]
        assert storage.sha256(f"{folder}/large.bin") == hashlib.sha256(data).hexdigest()
        with storage.reading(f"{folder}/large.bin") as file:
            assert file.read() == data
        assert storage.listing(folder) == ["large.bin", "small.bin"]
        storage.remove(f"{folder}/small.bin")
        assert not storage.exists(f"{folder}/small.bin")
    assert len(requests) >= 15, "some were sent again"


@pytest.mark.usefixtures("small_parts")
def test_a_large_download_goes_on_where_it_broke_off(folder: str, s3_server: Relay) -> None:
    """Left to itself, s3fs fetches parts side by side, and gives up when one of them breaks."""
    data = os.urandom(12 * MEGABYTE)
    storage.write_bytes(f"{folder}/weights.bin", data)
    with s3_server.failing(once("GET", "break download")):
        assert storage.sha256(f"{folder}/weights.bin") == hashlib.sha256(data).hexdigest()
    with s3_server.failing(once("GET", "break download")):
        assert storage.read_bytes(f"{folder}/weights.bin") == data


@pytest.mark.faults("S3: a lost end of an upload")
@pytest.mark.usefixtures("small_parts")
def test_the_end_of_an_upload_may_get_lost(folder: str, s3_server: Relay) -> None:
    """The server has joined the parts, nobody hears of it, and it is asked again."""
    data = os.urandom(12 * MEGABYTE)
    with s3_server.failing(once("POST", "lose answer", "?uploadId=")):
        replaced(f"{folder}/large.bin", data)
    assert storage.read_bytes(f"{folder}/large.bin") == data


def once(method: str, fault: str, inside: str = "") -> s3server.Fault:
    left = [fault]
    return lambda used, target: left.pop() if left and used == method and inside in target else ""


# ---- trouble that stays


@pytest.mark.faults("S3: overloaded for good")
@pytest.mark.usefixtures("small_parts", "impatient")
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            "slow down",
            r"could not be written \(.*reduce your request rate.*\); the server is overloaded, so run the same",
        ),
        (
            "break upload",
            r"could not be written \(.*\); the server does not answer: check the address, or run the same",
        ),
    ],
    ids=["slow down", "break upload"],
)
def test_endless_trouble_is_one_sentence_and_nothing_is_half_written(
    folder: str, s3_server: Relay, fault: str, sentence: str
) -> None:
    data = os.urandom(12 * MEGABYTE)
    storage.write_bytes(f"{folder}/old.bin", b"old")

    def puts(method: str, target: str) -> str:
        return fault if method == "PUT" else ""

    with s3_server.failing(puts):
        for write, name in [(replaced, "old.bin"), (replaced, "new.bin"), (storage.write_bytes, "shard.bin")]:
            with pytest.raises(Outage, match=sentence) as caught:
                write(f"{folder}/{name}", data)
            assert "\n" not in str(caught.value)
            assert str(caught.value).startswith(f"{folder}/{name} ")
    assert storage.listing(folder) == ["old.bin"]
    assert storage.read_bytes(f"{folder}/old.bin") == b"old"
    fs, path = storage.filesystem(folder)
    left = fs.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=path.partition("/")[2])
    assert not left.get("Uploads"), "parts without a file cost money"


@pytest.mark.usefixtures("impatient")
def test_a_broken_download_leaves_nothing_in_the_cache(folder: str, s3_server: Relay, tmp_path: Path) -> None:
    storage.write_bytes(f"{folder}/weights.bin", os.urandom(MEGABYTE))

    def gets(method: str, target: str) -> str:
        return "break download" if method == "GET" else ""

    refused = pytest.raises(Outage, match=r"weights\.bin could not be read")
    with s3_server.failing(gets), refused:
        storage.local(f"{folder}/weights.bin")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.faults("S3: overloaded for good")
@pytest.mark.usefixtures("impatient")
def test_a_shard_that_cannot_be_written_is_reported(folder: str, s3_server: Relay, tmp_path: Path) -> None:
    recipe = tiny.tiny(tmp_path)
    facts = PairFacts.of(recipe)
    ids = np.arange(16)
    drawn = noise.gaussian(1, ids, facts.length, facts.dim)
    rows = Rows(ids, noise.labels(ids, 3), drawn, np.zeros((16, 14), np.uint16))
    manifest.claim(folder, facts, recipe)
    down = pytest.raises(Outage, match=r"shard-00000\.parquet could not be written")
    with s3_server.failing(lambda method, target: "slow down" if method == "PUT" else ""), down:
        commits.write_owned(folder, facts, "here", pairs.table(facts, rows))
    assert storage.listing(folder) == ["_recipe.json"]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*args: Any) -> None:
        raise AssertionError("this was to be refused before any work")

    monkeypatch.setattr(cluster, "connect", work)
    monkeypatch.setattr(tracking.Run, "start", work)


@pytest.mark.faults("S3: wrong credentials, nobody answers, read only")
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, Refused, "permission denied"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, Refused, "permission denied"),
        (REFUSED, Outage, "Could not connect to the endpoint URL: .*; the server does not answer: check the address"),
        (READ_ONLY, Refused, "could not be written: permission denied"),
    ],
    ids=["wrong secret", "unknown key", "nobody answers", "read only"],
)
def test_what_cannot_work_is_refused_by_every_job(
    journey: Journey, folder: str, changes: dict[str, str], kind: type[Exception], sentence: str
) -> None:
    recipe = journey.recipe
    for job, part in [(generate_job, "pairs"), (distill, "train"), (evaluate_job, "evaluate")]:
        elsewhere = replace(recipe, **{part: replace(getattr(recipe, part), uri=f"{folder}/{part}")})
        with client(**changes), pytest.raises(kind, match=sentence) as caught:
            job(elsewhere)
        assert "\n" not in str(caught.value)
    assert storage.listing(folder) == []


@pytest.mark.usefixtures("no_work")
def test_a_missing_bucket_is_one_sentence(s3_server: Relay, tmp_path: Path) -> None:
    recipe = replace(tiny.tiny(tmp_path), run="s3://no-such-bucket/run")
    refused = pytest.raises(FileNotFoundError, match=r"s3://no-such-bucket/run/pairs/.* there is no such bucket")
    with s3_server.failing(every(1, "no bucket")), refused:
        generate_job(recipe)


# ---- the three jobs


@dataclass
class Journey:
    """Where the three jobs were run: on a disk, and on S3 with interruptions and failures on the way."""

    disk: Recipe
    recipe: Recipe
    folder: Path
    ray: str
    said: str
    drawn: list[str]


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def journey(s3_server: Relay, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    folder, uri, said = tmp_path_factory.mktemp("s3"), f"s3://{BUCKET}/journey", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))  # its list of fonts takes seconds
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(places, "home", lambda: folder / "home")
        disk = tiny.tiny(folder, **tiny.IMAGES)
        disk = replace(
            tiny.with_pairs(disk, count=60, shard_rows=12),
            train=replace(disk.train, log_every=1, checkpoint_every=2, warmup=0),
            evaluate=replace(
                disk.evaluate,
                count=12,
                samplers=[{"name": "Autoregressive"}, {"name": "FewStep", "steps": [1]}],
            ),
        )
        teacher = {}
        for name in ("tokenizer", "checkpoint"):
            teacher[name] = f"{uri}/weights/{name}.safetensors"
            storage.write_bytes(teacher[name], Path(getattr(disk.teacher, name)).read_bytes())
        recipe = replace(disk, run=f"{uri}/run", teacher=replace(disk.teacher, **teacher))
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            make_pairs(disk)
            distill(disk)
            drawn = run_with_trouble(recipe, s3_server, patch)
        yield Journey(disk, recipe, folder, ray_cluster, said.getvalue(), drawn)


def make_pairs(recipe: Recipe) -> None:
    """The pair set of a recipe on a disk, without Ray."""
    facts, size = PairFacts.of(recipe), recipe.pairs.shard_rows
    manifest.claim(recipe.pairs_uri, facts, recipe)
    replica = Replica(recipe, facts)
    made = [replica.rows(number, size) for number in range(recipe.pairs.count // size)]
    shards = [pairs.write_shard(recipe.pairs_uri, facts, pairs.table(facts, rows)) for rows in made]
    manifest.finish(recipe.pairs_uri, facts, shards, {"rows": recipe.pairs.count, "seconds": 1.0, "device": "cpu"})


def run_with_trouble(recipe: Recipe, server: Relay, patch: pytest.MonkeyPatch) -> list[str]:
    """Every job is stopped half-way and run again; names of what the second evaluation drew."""
    committed, log, rows = completion.commits, Observer.log, drawing.parts_of

    def one_shard(recipe: Recipe, gap: Gap, *rest: Any) -> Iterator[passes.Outcome]:
        """What Ray's workers do, here: they take seconds to start."""
        table = pairs.table(gap.facts, Replica(recipe, gap.facts).rows(0, 12))
        yield passes.Outcome(0, commits.write_owned(recipe.pairs_uri, gap.facts, "here", table))
        raise Stopped

    def three_steps(observer: Observer, metrics: dict[str, float]) -> None:
        log(observer, metrics)
        if observer.state.step == 3:
            raise Stopped

    def stop(*args: Any) -> None:
        raise Stopped

    drawn: list[str] = []

    def noted(plan: Any, todo: list[Any], frequencies: Any) -> Any:
        drawn.extend(draw.name for draw in todo)
        return rows(plan, todo, frequencies)

    patch.setattr(completion, "commits", one_shard)
    with pytest.raises(Stopped):
        generate_job(recipe)
    assert not storage.exists(f"{recipe.pairs_uri}/_manifest.json")
    patch.setattr(completion, "commits", committed)
    with server.failing(every(6, *FAULTS)), server.counting() as requests:
        assert "Made" in generate_job(recipe)
    assert len(requests) >= 24, "each of the four faults came up"

    patch.setattr(Observer, "log", three_steps)
    with pytest.raises(Stopped):
        distill(recipe)
    assert storage.listing(f"{recipe.student_uri}/checkpoints") == ["step-00000002.pt"]
    patch.setattr(Observer, "log", log)
    with server.failing(every(4, *FAULTS)):
        distill(recipe)

    patch.setattr(timing, "time_alone", stop)
    with pytest.raises(Stopped):
        evaluate_job(recipe)
    patch.setattr(timing, "time_alone", lambda plan, *rest: timing.time_samplers(plan, *rest[:2], threads=1))
    patch.setattr(drawing, "parts_of", noted)
    evaluate_job(recipe)
    return drawn


@pytest.mark.faults("S3: all three jobs stopped half-way, on a server that fails")
def test_the_pairs_are_those_of_a_disk(journey: Journey) -> None:
    there, here = journey.recipe.pairs_uri, Path(journey.disk.pairs_uri)
    names = sorted(path.name for path in here.iterdir())
    assert storage.listing(there) == names
    for name in (name for name in names if name.startswith("shard-")):
        assert storage.read_bytes(f"{there}/{name}") == (here / name).read_bytes()
    assert manifest.read(there)["made"][0]["rows"] < 60, "what was committed was not made again"
    lines = [pairs.verify(place)["shards"] for place in (there, str(here))]
    assert [line | {"host": ""} for line in lines[0]] == lines[1]
    assert generate_job(journey.recipe).startswith("Nothing is missing")


@pytest.mark.faults("S3: nobody answers for a while")
def test_an_outage_costs_no_finished_shard(
    journey: Journey, folder: str, s3_server: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins when the second shard is sent and ends once it is noticed; the job goes on by itself."""
    recipe, sent, noticed, lines = tiny.with_pairs(journey.recipe, uri=f"{folder}/pairs"), [], threading.Event(), []

    def outage(method: str, target: str) -> str:
        if method == "PUT" and "shard-" in target:
            sent.append(target)
        return "break upload" if len(sent) > 1 and not noticed.is_set() else ""

    def say(own: Heartbeat, line: str) -> None:
        lines.append(line)
        if "It is tried again until it answers" in line:
            noticed.set()

    monkeypatch.setattr(Heartbeat, "_say", say)
    with s3_server.failing(outage):
        assert "Made 60 pairs" in generate_job(recipe)
    trouble = [line for line in lines if "could not be" in line]
    assert len(trouble) == 1, "said once"
    assert f"{folder}/pairs answers again." in lines
    for path in Path(journey.disk.pairs_uri).glob("shard-*"):
        assert storage.read_bytes(f"{folder}/pairs/{path.name}") == path.read_bytes()


def test_the_student_is_that_of_a_disk(journey: Journey) -> None:
    one, other = (
        load_file(storage.local(f"{r.student_uri}/model.safetensors")) for r in (journey.recipe, journey.disk)
    )
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert "from step 2 of 6" in journey.said
    assert storage.listing(f"{journey.recipe.student_uri}/checkpoints") == ["step-00000004.pt", "step-00000006.pt"]
    assert distill(journey.recipe).startswith("Nothing is missing")


def test_the_report_is_on_s3(journey: Journey) -> None:
    uri = journey.recipe.report_uri
    files = ["report.html", "report.json", "report.md", "samples.png", "timing.json", "tradeoff.png"]
    assert storage.listing(uri) == files
    assert len(storage.listing(f"{journey.recipe.run}/cache")) == 3, "two samplers and the real images"
    assert journey.drawn == [], "what was drawn before the interruption was not drawn again"
    assert "Nothing is missing" in evaluate_job(journey.recipe)


def test_mlflow_stays_on_this_machine(journey: Journey) -> None:
    assert f"it is {journey.folder}/home/mlflow.db on this machine" in journey.said
    assert (journey.folder / "home" / "mlflow.db").exists()


@pytest.mark.faults("student: a checkpoint that cannot be written")
@pytest.mark.usefixtures("impatient")
def test_a_job_that_cannot_write_ends_with_one_sentence_and_goes_on_later(
    journey: Journey, folder: str, s3_server: Relay
) -> None:
    recipe = replace(journey.recipe, train=replace(journey.recipe.train, uri=f"{folder}/student"))

    def saving(method: str, target: str) -> str:
        return "slow down" if method == "PUT" and "step-00000004.pt" in target else ""

    with (
        s3_server.failing(saving),
        pytest.raises(Outage, match=r"step-00000004\.pt could not be written") as caught,
    ):
        distill(recipe)
    assert "\n" not in str(caught.value)
    assert storage.listing(f"{folder}/student/checkpoints") == ["step-00000002.pt"]
    assert "after 6 steps" in distill(recipe)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.faults("S3: checkpoint cut short, emptied or with a flipped bit")
@pytest.mark.parametrize("damage", [cut, flipped, lambda data: b""], ids=["cut", "flipped", "emptied"])
def test_a_damaged_checkpoint_is_passed_over(
    journey: Journey, folder: str, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(journey.recipe, train=replace(journey.recipe.train, uri=f"{folder}/student"))
    there = f"{journey.recipe.student_uri}/checkpoints"
    for name in ("step-00000004.pt", "step-00000006.pt"):
        data = storage.read_bytes(f"{there}/{name}")
        storage.write_bytes(f"{folder}/student/checkpoints/{name}", damage(data) if "6" in name else data)
    storage.write_bytes(
        f"{folder}/student/recipe.json", storage.read_bytes(f"{journey.recipe.student_uri}/recipe.json")
    )
    assert "after 6 steps" in distill(recipe)
    said = capsys.readouterr().out
    assert "step-00000006.pt is damaged; looking for the checkpoint before it." in said
    assert "from step 4 of 6" in said
    one, other = (load_file(storage.local(f"{r.student_uri}/model.safetensors")) for r in (journey.recipe, recipe))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.faults("S3: down for a while")
@pytest.mark.usefixtures("no_work")
def test_a_job_on_a_server_that_is_down_exits_1(
    journey: Journey, s3_server: Relay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is wrong with the input, so the status is not that of a bad recipe."""
    monkeypatch.setattr(command_line, "parse", lambda doc: journey.recipe)
    for job in (generate_job, distill, evaluate_job):
        with client(**REFUSED), pytest.raises(SystemExit) as caught:
            command_line.main(None, job)
        assert caught.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("error: s3://")
        assert "run the same command again later" in said
        assert said.count("\n") == 1


# ---- secrets


def test_the_secret_is_nowhere(journey: Journey) -> None:
    """In no file of the run, of MLflow, of Ray, in nothing that a job said."""
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == SECRET
    fs, root = storage.filesystem(f"s3://{BUCKET}/journey")
    contents = {name: fs.cat_file(name) for name in fs.find(root)}
    for folder in (journey.folder, Path(journey.ray)):
        paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        contents |= {str(path): path.read_bytes() for path in paths}
    contents["said"] = journey.said.encode()
    names = " ".join(contents)
    for expected in ("pairs/_manifest.json", "student/recipe.json", "step-00000006.pt", "home/mlflow.db", "raylet.out"):
        assert expected in names
    assert not [name for name, content in contents.items() if SECRET.encode() in content]


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/x", "s3://key:sec/ret+1@bucket/x@y", "gs://k:secret@bucket"])
def test_credentials_in_a_uri_are_refused(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"pairs\.uri carries a user and a password; take them out") as caught:
        Recipe(pairs=replace(Recipe().pairs, uri=uri))
    assert "sec" not in str(caught.value)
    with pytest.raises(ValueError, match=r"the URI \.\.\.@.* carries a user and a password") as caught:
        storage.exists(uri)
    assert "sec" not in str(caught.value)
    with pytest.raises(SystemExit):
        parse(None, ["--evaluate.samplers", f"[{{name: FewStep, steps: [1]}}, {{name: '{uri}'}}]"])
    assert capsys.readouterr().err.startswith("error: evaluate.samplers carries a user and a password;")


def test_a_colon_or_an_at_sign_is_no_password() -> None:
    for uri in (
        "s3://bucket/a:b@c",
        "http://host:80/x@2.pth",
        "hf://owner/repo@main/x:y",
        "s3://arn:aws:s3:x:1:ap/k@l",
    ):
        places.check_no_credentials(uri, "this")
