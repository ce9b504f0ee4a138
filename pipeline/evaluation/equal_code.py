"""Which code shapes a report's images and times, and which older code is its equal.

Statistics are kept as long as the code that shapes them has the same digest. A digest follows names, so it changes when
code is only moved or renamed, and 50,000 images would be drawn again for nothing. ``equal_code.json`` prevents that: it
leads from a digest to that of older code which drew the same images, bit for bit. Once a test has shown that,

    python -m pipeline.evaluation.equal_code OLD_CHECKOUT

writes down that the code there is the equal of the code here: that of every sampler with each family that ships, that
of real images, and that which measures speed. Families outside this package are not in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.host import provenance
from pipeline.host.errors import Refused
from pipeline.sampling.samplers import SAMPLERS, Sampler

PLACE = Path(__file__).with_name("equal_code.json")
FAMILIES = ("pipeline.models.llamagen", "pipeline.models.var")
REAL, MEASURING = "real images", "measuring"
# What shapes statistics: how images are looked at, and how a sampler's are drawn.
SCORED = (
    "pipeline.evaluation.artist:look_at",
    "pipeline.scoring.instruments:features",
    "pipeline.scoring.instruments:real",
)
DRAWN = ("pipeline.evaluation.artist:draw_images", "pipeline.evaluation.artist:load_models", "pipeline.noise:labels")
STUDENT, FREQUENCIES = "pipeline.evaluation.artist:load_student", "pipeline.pairs.shards:token_frequencies"
SPEED = "pipeline.sampling.speed:measure"
# Run in another checkout: the digests there, by the names that they have here. Before there was this module, ``_code``
# of the plan knew the roots.
QUESTION = """
import importlib, json, pipeline
from types import SimpleNamespace

def answer(families):
    try:
        return importlib.import_module("pipeline.evaluation.equal_code").everything()
    except ImportError:
        pass
    for layout in (("evaluation.plan", "sampling.samplers", "host.provenance", "sampling.speed"),
                   ("plan", "samplers", "provenance", "speed")):
        try:
            plan, samplers, provenance = (importlib.import_module(f"pipeline.{name}") for name in layout[:3])
        except ImportError:
            continue
        listed = [object.__new__(kind) for kind in samplers.SAMPLERS]
        out = {"measuring": provenance.digest(f"pipeline.{layout[3]}:measure")}
        for family in families:
            code = plan._code(SimpleNamespace(teacher=SimpleNamespace(family=family)), listed)
            out["real images"] = code.pop("real images")
            out |= {f"{family} {kind}": digest for kind, digest in code.items()}
        return out
    raise SystemExit("this checkout has no evaluation whose code is known")

print(json.dumps([list(pipeline.__path__), answer(FAMILIES)]))
"""


def of_draws(family: str, kinds: Iterable[type[Sampler]]) -> dict[str, str]:
    """Digests of the code behind real images' statistics and behind those of each kind of sampler, by class name."""
    out = {REAL: _of(*SCORED)}
    for kind in kinds:
        roots = [*SCORED, *DRAWN, f"{kind.__module__}:{kind.__name__}"]
        roots += [f"{family}:Config", f"{family}:Teacher", f"{family}:Tokenizer"]
        roots += [STUDENT, f"{family}:Student"] if kind.student else []
        roots += [FREQUENCIES] if kind.frequencies else []
        out[kind.__name__] = _of(*roots)
    return out


def of_measuring() -> str:
    """Digest of the code that measures speed."""
    return _of(SPEED)


def _of(*roots: str) -> str:
    return oldest(provenance.digest(*roots), known())


def known() -> dict[str, str]:
    """{digest: digest of the code that did the same before}, as the package ships it."""
    return json.loads(PLACE.read_text())


def oldest(digest: str, equals: Mapping[str, str]) -> str:
    """The digest at the end of the chain that ``digest`` begins; one that nobody knows stands for itself."""
    left = dict(equals)
    while digest in left:
        digest = left.pop(digest)  # so that a ring ends, too
    return digest


# ---- the command


def everything() -> dict[str, str]:
    """The digest of every family that ships with every sampler, of real images, and of measuring."""
    out = {MEASURING: of_measuring()}
    for family in FAMILIES:
        code = of_draws(family, SAMPLERS)
        out[REAL] = code.pop(REAL)
        out |= {f"{family} {kind}": digest for kind, digest in code.items()}
    return out


def of_checkout(folder: Path) -> dict[str, str]:
    """``everything`` as another checkout of this package answers it; Refused where none is there, or answers not."""
    question = f"FAMILIES = {FAMILIES!r}\n{QUESTION}"
    environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
    command = [sys.executable, "-c", question]
    answer = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise Refused(f"{folder} does not say which code is there: {answer.stderr.strip()}")
    places, digests = json.loads(answer.stdout.splitlines()[-1])
    if not all(Path(place).is_relative_to(folder.resolve()) for place in places):  # an installed one answered
        raise Refused(f"{folder} holds no checkout of this package; give the folder that has pipeline/ in it.")
    return digests


def joined(equals: Mapping[str, str], here: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    """``equals`` with every digest of ``here`` leading to that of the same name ``there``, where the two differ."""
    out = dict(equals)
    for name in here.keys() & there.keys():
        old = oldest(there[name], equals)
        if old != here[name]:
            out.setdefault(here[name], old)
    return dict(sorted(out.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: python -m pipeline.evaluation.equal_code OLD_CHECKOUT, which adds to {PLACE}")
    before = known()
    try:
        after = joined(before, everything(), of_checkout(Path(sys.argv[1])))
    except Refused as refusal:
        raise SystemExit(f"error: {refusal}") from None
    PLACE.write_text(json.dumps(after, indent=2) + "\n")
    print(f"{PLACE}: {len(after)} digests have an older equal, {len(after) - len(before)} of them new.")
