"""Pairs a second of the real job: its own process, its Ray, its Parquet, for as long as there is time."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline import storage
from pipeline.device.notes import Notes
from pipeline.host.errors import Unfinished
from pipeline.pairs import manifest
from pipeline.recipe import Recipe

JOB = Path(__file__).parents[2] / "jobs" / "generate_pairs.py"
STOPPING = 15.0  # seconds at the end in which the job is told to stop and does
LOOK = 0.25  # seconds between two looks at the folder


def measure(recipe: Recipe, folder: Path, notes: Notes) -> None:
    """Run jobs/generate_pairs.py on the recipe in ``folder`` until time is over, then count what lies in Parquet.

    Raises Unfinished, one sentence, where the job ended by itself with an error or wrote fewer than two shards.
    """
    config, log, begun = folder / "recipe.yaml", folder / "job.log", time.time()
    config.write_text(json.dumps(recipe.resolved()))
    with log.open("wb") as file:
        job = subprocess.Popen([sys.executable, str(JOB), "--config", str(config)], stdout=file, stderr=file)
        try:
            while job.poll() is None and notes.left > STOPPING:
                time.sleep(LOOK)
            status = job.poll()
        finally:
            end(job)
    said = log.read_text(errors="replace").strip()
    print(said, flush=True)
    if status:
        raise Unfinished(f"generate_pairs ended with status {status}: {said.splitlines()[-1] if said else 'no word'}")
    sizes = manifest.shards_among(storage.sizes(recipe.pairs_uri))
    written = sorted(when for name, when in storage.modified(recipe.pairs_uri).items() if name in sizes)
    if len(written) < 2:
        raise Unfinished(f"{len(written)} shards of {recipe.pairs.shard_rows} pairs were written; a rate needs two.")
    rows, seconds = recipe.pairs.shard_rows * (len(written) - 1), written[-1] - written[0]
    notes.put(pairs_rate=rows / seconds, pairs=rows, seconds=seconds, starting=written[0] - begun)
    notes.put(row_bytes=sum(sizes.values()) / len(sizes) / recipe.pairs.shard_rows)
    notes.put(f"Shards of {recipe.pairs.shard_rows} pairs, batches of {recipe.pairs.batch}.")


def end(process: subprocess.Popen[bytes], seconds: float = STOPPING - 3) -> None:
    """Tell a process to end, and end it where it does not within ``seconds``."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
