"""What a student's folder says, and what is said of one that lacks something."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hub
import numpy as np
import pytest
import torch
from s3server import BUCKET, Relay
from shared_student import shared
from tiny import tiny, tiny_text

from pipeline import Generator, storage
from pipeline.generator import folder
from pipeline.generator.sample import main
from pipeline.host.errors import Missing, Refused
from pipeline.models import checkpoints
from pipeline.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return shared(tiny(tmp_path, "var"))


def edited(recipe: Recipe, **changes: Any) -> str:
    """The folder with other values in its config.json."""
    place = storage.join(recipe.student_uri, folder.CONFIG)
    storage.write_json(place, storage.read_json(place) | changes)
    return recipe.student_uri


def test_the_folder_needs_neither_teacher_nor_recipe(recipe: Recipe) -> None:
    """Its decoder is its own copy of the teacher's."""
    tokenizer = checkpoints.tokenizer(recipe.teacher)
    Path(recipe.teacher.tokenizer).unlink()
    Path(recipe.teacher.checkpoint).unlink()
    Path(recipe.student_uri, "recipe.json").unlink()
    found = folder.read(recipe.student_uri)
    assert found.recipe is None
    assert found.text is None
    assert (found.split, found.start_steps, found.options) == (1, (1, 2), {"mask": "released"})
    own = checkpoints.tokenizer(found.settings)
    assert all(torch.equal(own.state_dict()[name], value) for name, value in tokenizer.state_dict().items())


def test_a_linked_decoder_is_the_one_that_it_was(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "llamagen")
    linked = shared(replace(recipe, train=replace(recipe.train, tokenizer="link")))
    assert not Path(linked.student_uri, folder.TOKENIZER).exists()
    assert folder.read(linked.student_uri).settings.tokenizer == recipe.teacher.tokenizer
    tiny(tmp_path, "llamagen", seed=1)
    with pytest.raises(Refused, match=r"is not the decoder that the student at .* was trained with"):
        folder.read(linked.student_uri)


def test_a_finished_folder_changes_between_copy_and_link(tmp_path: Path) -> None:
    """Nothing but config.json and the copy is written, and either way the student draws with the same decoder."""
    recipe = shared(tiny(tmp_path, "llamagen"))
    checksums, uri = checkpoints.checksums(recipe.teacher), Path(recipe.student_uri)
    linked = replace(recipe, train=replace(recipe.train, tokenizer="link"))
    before = {path.name: path.read_bytes() for path in uri.iterdir()}
    decoder = checkpoints.tokenizer(folder.read(recipe.student_uri).settings).state_dict()

    assert folder.with_decoder_as_asked(recipe, checksums) == ""
    assert "names the decoder's weights at" in folder.with_decoder_as_asked(linked, checksums)
    assert not (uri / folder.TOKENIZER).exists()
    assert folder.read(recipe.student_uri).settings.tokenizer == recipe.teacher.tokenizer
    assert folder.with_decoder_as_asked(linked, checksums) == ""

    assert folder.with_decoder_as_asked(recipe, checksums).endswith("holds the decoder's weights now.")
    own = checkpoints.tokenizer(folder.read(recipe.student_uri).settings).state_dict()
    assert all(torch.equal(own[name], value) for name, value in decoder.items())
    assert {path.name: path.read_bytes() for path in uri.iterdir()} == before
    (uri / folder.TOKENIZER).unlink()
    assert folder.with_decoder_as_asked(recipe, checksums), "a copy that was lost is made again"
    assert {path.name: path.read_bytes() for path in uri.iterdir()} == before


def test_a_copy_that_a_killed_job_left_behind_goes_with_the_next(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "llamagen")
    linked = shared(replace(recipe, train=replace(recipe.train, tokenizer="link")))
    left = Path(linked.student_uri, folder.TOKENIZER)
    left.write_bytes(b"half done")
    assert folder.with_decoder_as_asked(linked, checkpoints.checksums(recipe.teacher))
    assert not left.exists()


def test_prompts_bring_their_encoder(tmp_path: Path) -> None:
    recipe = shared(tiny_text(tmp_path))
    assert folder.read(recipe.student_uri).text == recipe.text


@pytest.mark.faults("student's folder: a part of it is missing")
@pytest.mark.parametrize("name", [folder.WEIGHTS, folder.TOKENIZER, folder.CONFIG])
def test_what_is_missing_is_named(recipe: Recipe, name: str) -> None:
    Path(recipe.student_uri, name).unlink()
    with pytest.raises(Missing, match=name):
        folder.read(recipe.student_uri)


def test_a_config_of_something_else_is_refused(recipe: Recipe) -> None:
    storage.write_json(storage.join(recipe.student_uri, folder.CONFIG), {"model_type": "t5"})
    with pytest.raises(Refused, match=r"does not describe a student of Distilled Decoding: it has no family"):
        folder.read(recipe.student_uri)


def test_a_folder_of_before_is_read(recipe: Recipe) -> None:
    """With its weights under their name of then, and recipe.json for the rest."""
    uri, before = recipe.student_uri, folder.read(recipe.student_uri)
    Path(uri, folder.WEIGHTS).rename(Path(uri, folder.EARLIER))
    for name in (folder.CONFIG, folder.TOKENIZER, folder.CARD):
        Path(uri, name).unlink()
    found = folder.read(uri)
    assert found.settings.tokenizer == recipe.teacher.tokenizer
    assert (found.split, found.start_steps, found.text) == (before.split, before.start_steps, None)
    assert folder.weights(uri) == folder.weights_of(uri) == found.weights == storage.join(uri, folder.EARLIER)
    assert folder.weights_of(f"{uri}/theirs.pth") == f"{uri}/theirs.pth"


def test_a_folder_in_a_bucket_is_read(recipe: Recipe) -> None:
    """All that is asked of a place is that it holds files."""
    place = f"memory://bucket-{uuid.uuid4().hex}/student"
    for name in (folder.CONFIG, folder.WEIGHTS, folder.TOKENIZER):
        storage.write_bytes(f"{place}/{name}", Path(recipe.student_uri, name).read_bytes())
    found = folder.read(place)
    assert found.weights == f"{place}/{folder.WEIGHTS}"
    assert found.settings.tokenizer == f"{place}/{folder.TOKENIZER}"
    assert found.settings.config == recipe.teacher.config


@pytest.mark.faults("the Hub: gone after a student was fetched")
def test_a_student_and_its_encoder_on_the_hub(tmp_path: Path) -> None:
    """hf:// for both; when the Hub cannot be asked any more, what was fetched draws the same.

    In a process of its own, for huggingface_hub reads its address on import.
    """
    recipe = shared(tiny_text(tmp_path))
    expected = Generator.from_pretrained(recipe.student_uri, "cpu").draw(["zero one", "two"])
    place = edited(recipe, text=asdict(replace(recipe.text, encoder="hf://owner/encoder")))
    Path(place, folder.RECIPE).unlink()  # as one is shared
    code = (
        "import os, urllib.request; from pipeline import Generator\n"
        "def draw(): print(Generator.from_pretrained('hf://owner/student', 'cpu').draw(['zero one', 'two']).tolist())\n"
        f"draw(); urllib.request.urlopen(os.environ['HF_ENDPOINT'] + {hub.STOP!r}); draw()"
    )
    with hub.serve(student=Path(place), encoder=tmp_path / "encoder") as server:
        env = os.environ | hub.environment(server, tmp_path / "cache")
        env |= {"PYTHONPATH": str(Path(storage.__file__).parents[1])}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)
    assert out.returncode == 0, out.stderr
    drawn = [line for line in out.stdout.splitlines() if line.startswith("[")]
    assert drawn == [str(expected.tolist())] * 2
    fetched = [path for path in server.asked if "/resolve/" in path]  # type: ignore[attr-defined]
    assert len(fetched) == len(set(fetched)), "each file once"
    assert "hf://owner/encoder/model.safetensors cannot be asked for now; what was downloaded before" in out.stdout


def test_a_student_and_its_encoder_in_a_bucket(
    s3_server: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3:// for both, and for the images' folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, bucket = shared(tiny_text(tmp_path)), f"s3://{BUCKET}/{uuid.uuid4().hex}"
    expected = Generator.from_pretrained(recipe.student_uri, "cpu").draw(["zero one", "two"])
    place = edited(recipe, text=asdict(replace(recipe.text, encoder=f"{bucket}/encoder")))
    for name, source in (("student", place), ("encoder", str(tmp_path / "encoder"))):
        for file in storage.listing(source):
            storage.write_bytes(f"{bucket}/{name}/{file}", Path(source, file).read_bytes())
    assert torch.equal(Generator.from_pretrained(f"{bucket}/student", "cpu").draw(["zero one", "two"]), expected)
    main("Draws.", ["--student", f"{bucket}/student", "--prompt", "two", "--count", "3", "--out", f"{bucket}/images"])
    assert storage.listing(f"{bucket}/images") == ["0.png", "1.png", "2.png", "sample.json"]
    main("Draws.", ["--student", f"{bucket}/student", "--prompt", "two", "--count", "3", "--out", f"{bucket}/i.npz"])
    with storage.reading(f"{bucket}/i.npz") as file, np.load(file) as arrays:
        assert arrays["arr_0"].shape == (3, 6, 6, 3)
