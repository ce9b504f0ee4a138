"""The sentences of a report: what its rows and columns are and how each number was made, from its own results."""

from __future__ import annotations

from pipeline.report.origin import MachineLoad, Origin
from pipeline.report.protocol import precisions
from pipeline.report.results import Results
from pipeline.report.tables import (
    DEPARTS,
    PROMPT_AGREEMENT,
    WITH_ENCODER,
    beside_paper,
    columns,
    further_columns,
    kernel_distance,
    ms,
    short_title,
    throughput_batch,
)


def introduction(results: Results) -> str:
    """What was drawn, for whom it was drawn alike."""
    origin = results["made"]
    return (
        f"{origin['count']:,} images per sampler, sample ids from 0, seed {origin['seed']}; the same id gives"
        f" every sampler the same {'prompt' if of_prompts(results) else 'label'} and the same noise."
    )


def of_prompts(results: Results) -> bool:
    """Whether images were drawn for prompts, not for classes."""
    return "prompts" in results["made"]


def about_grid(results: Results) -> str:
    """What the rows and columns of the sample grid are."""
    text = "One row per sampler, one column per noise."
    if "grid" not in results:
        return text
    return f"{text} Its prompts, cut and with boxes for what cannot be drawn, stand above them, and whole below."


ROWS = {
    "Autoregressive": ("teacher, AR", "the teacher as it is sampled without us: every token drawn from p."),
    "FlowMatched": (
        "teacher, FM",
        "the teacher through flow matching (Alg. 1): every token is the code that its noise flows to. What the student"
        " imitates.",
    ),
    "FewStep": (
        "DD n steps",
        "the student jumps from noise to all tokens (Alg. 3), and again from each AR step in brackets, keeping what is"
        " before it.",
    ),
    "WithTeacher": (
        "DD pre-trained-n-m",
        "the student jumps, the teacher draws AR steps n to m - 1 anew, the student jumps again from step m (Alg. 4);"
        " jumps of which nothing would be kept are left out.",
    ),
    "Skip": (
        "skip-n",
        "the teacher without its last n AR steps. The paper does not say what stands in their places; here it is the"
        " zero vector of the code space: a VAR residual that adds nothing (but its convolution's bias), the centre of"
        " LlamaGen's unit sphere.",
    ),
    "OneStepStar": (
        "onestep*",
        "every position on its own, from the token frequencies of the pair set there; given the class, from those of"
        " the pairs of that class. No network is asked, and the time is that of drawing and decoding.",
    ),
}

WITH_PROMPTS = {  # what reads otherwise there
    "OneStepStar": (
        "onestep*",
        "every position on its own, from the token frequencies of the pair set there, whatever the prompt. No network"
        " is asked, and the time is that of drawing and decoding.",
    ),
}


def about_rows(results: Results) -> list[tuple[str, str]]:
    """(name, how it draws) of the samplers in the table."""
    kinds = {row["sampler"]["name"] for row in results["rows"] if row.get("sampler")}
    departing = [f"{row['name']}: {', '.join(row['departs'])}" for row in results["rows"] if row.get("departs")]
    out = [text for kind, text in (ROWS | (WITH_PROMPTS if of_prompts(results) else {})).items() if kind in kinds]
    if departing:
        out.append((DEPARTS, f"asks more of its student than that was trained for: {'; '.join(departing)}."))
    out += [(f"of {name}", _about_student(results, name)) for name in results["made"].get("students", {})]
    return out + [("note", note) for note in results.get("notes", [])]


def _about_student(results: Results, name: str) -> str:
    """Who another student is, and whose speed stands in its rows."""
    origin = results["made"]["students"][name]
    text = f"the same sampler with another student, {origin['uri']}, SHA-256 {origin['SHA-256'][:12]}..."
    text += f", of {origin['pairs_count']:,} pairs" if "pairs_count" in origin else ""
    text += f", after {origin['step']:,} optimiser steps" if "step" in origin else ""
    text += ". Rows that name no student are of the recipe's own."
    if any(row.get("ms") for row in results["rows"] if row.get("student") == name):
        text += " Its networks have the shapes of the recipe's own student, which alone was timed."
    return text


def about_columns(results: Results) -> list[tuple[str, str]]:
    """(heading, how its numbers were made) of the columns in the table."""
    title, origin, short = results["title"], results["made"], short_title(results)
    headings = {column.heading for column in [*columns(results), *further_columns(results)]}
    distance, batch = results["meaning"], throughput_batch(results)
    if any(row.get("score_std") is not None for row in results["rows"]):
        distance += "; behind ± its standard error"
    texts = {
        "type": "as in the paper's tables: AR is the teacher, DD ours, DD + AR ours with the teacher in the loop,"
        " baseline what the paper compares with.",
        title: f"{distance}.",
        str(results.get("second_title")): "the same distance of the same images, in the flavour of the paper's FID.",
        str(results.get("dinov2_title")): _about_dinov2(origin),
        f"{short} / teacher's": "over that of the AR teacher, or of the FM teacher where that one is not listed.",
        f"{short}, limit": f"what {short} would be of infinitely many images (Chong and Forsyth 2020); fewer make it"
        " larger.",
        "sFID": "the same distance of features that still know where in the image they are (Nash et al. 2021).",
        kernel_distance(results): "Kernel Inception Distance (Bińkowski et al. 2018)"
        + ("" if short == "FID" else " of these features, which are not Inception's")
        + ", the mean over subsets.",
        "IS": "Inception Score by the classes of the same network, the mean over blocks of 5,000 images in the order of"
        " their ids, a shorter last one weighing less; behind ± the standard error of that mean, from five blocks on.",
        "FD, pixel PCA": "Fréchet distance of 50 principal components of grey thumbnails; it sees the blur that a"
        " classifier forgives.",
        "class accuracy": "share of images that the scoring network takes for what they were asked to be. "
        + ABOUT_CEILING,
        PROMPT_AGREEMENT: _about_prompt_agreement(results),
        **_about_clip(origin),
        "variance / teacher's": f"pixel variance {_about_variance(results)}; below 1 the sampler is less diverse than"
        " the teacher.",
        "precision": "precision and recall of Kynkäänniemi et al. 2019, k = 3; both depend on the number of images."
        + ("" if origin.get("precision and recall", True) else " Ours need real images: set evaluate.images."),
        "#parameters": _about_parameters(results),
        "#Step": "network evaluations per image, guidance not counted twice.",
        "ms/image, batch 1": _about_time(results),
        WITH_ENCODER: "the same with the text encoder's time added, which the other columns leave out.",
        "speed-up, batch 1": "how many times as fast as the AR teacher at the same batch"
        + _teachers_time(results)
        + "; behind ± its standard error, from drawing the rounds of calls anew (bootstrap of the ratio of medians).",
        f"images/s, batch {batch}": "the same calls' pace at the largest batch at which all of these samplers were"
        " timed: what a device makes that always has enough to do.",
        f"speed-up, batch {batch}": f"over the AR teacher at batch {batch} too. At batch 1 the teacher's many small"
        " steps leave much of a device idle, which a student does not; a full batch leaves less to save. No ratio here"
        " is of two batch sizes.",
    }
    out = [(heading, text) for heading, text in texts.items() if heading in headings]
    if not origin["timing"]["device"]:
        out.append(("speed", "was not measured: evaluate.timing_batches is empty."))
    if beside_paper(results):
        out.append(("paper", ABOUT_PAPER if origin.get("classes", 1) else ABOUT_TABLE_3))
    if pairs := results.get("alike"):
        text = "rows whose distances differ by less than the larger standard error, or by less than 1.3 %: "
        out.append(("not told apart", text + "; ".join(" and ".join(pair) for pair in pairs) + "."))
    return out + _about_few(results)


def _about_few(results: Results) -> list[tuple[str, str]]:
    """Which numbers rest on few images, or on some of them."""
    origin, title, out = results["made"], results["title"], list[tuple[str, str]]()
    if 0 < origin.get("real images", 0) <= origin["dimensions"] and origin["reference"]["statistics"] == "made here":
        few = f"Only {origin['real images']} real images for {origin['dimensions']} features"
        out.append((few, f"the reference's covariance is singular, and {title} against it says little."))
    if 0 < (kept := origin.get("features kept", {}).get("images", 0)) < origin["count"]:
        rounds = "which" if of_prompts(results) else "whole rounds of classes that"
        text = f"are of the features of {kept:,} of the images, {rounds} are evenly spread."
        out.append(("precision, recall, KID, limits and standard errors", text))
    if origin["count"] <= origin["dimensions"]:
        warning = f"Only {origin['count']} images for {origin['dimensions']} features"
        why = f"the covariance is singular and {title} is strongly biased; compare it only with runs of the same count."
        out.append((warning, why))
    return out


ABOUT_CEILING = (
    "The row of real images is of the plain images, not of what the tokenizer makes of them; every sampler's images"
    " come out of the tokenizer, so it is not exactly the ceiling of the other rows."
)

ABOUT_PAPER = (
    "printed in arXiv 2412.17153, Tables 1 and 2, as the recipe lists it: 50,000 images of ImageNet at 256 px. FID of"
    " the authors' own rows (teachers, DD, skip-n, onestep*) is by their copy of pytorch-fid; rows that the paper marks"
    " with a dagger are the VAR paper's, by ADM's evaluator, whose flavour is torch-fidelity. No code was released for"
    " IS, precision and recall, which ADM's evaluator most likely gave. Milliseconds per image are in steady state on"
    " an A100; the paper does not say at which batch, nor whether decoding is in it. Of pre-trained-n-m it counts the"
    " student alone, as here."
)


ABOUT_TABLE_3 = (
    "printed in arXiv 2412.17153, Table 3, as the recipe lists it: 5,000 prompts of LAION-COCO at 256 px, FID by the"
    " authors' copy of pytorch-fid. Which prompts, by which guidance, and how real images were cut, the paper does"
    " not say, nor whether its milliseconds per image, in steady state on an A100, include the text encoder."
)


def _about_clip(origin: Origin) -> dict[str, str]:
    """The columns of the CLIP score, where there is one."""
    if not (facts := origin.get("CLIP")):
        return {}
    return {
        "CLIP score": f"{facts['convention']}, by {facts['model']}; behind ± its standard error. That of the real"
        " images is what their own prompts reach. Scores of other models and conventions do not compare.",
        "CLIP score, others' prompts": "that of the same images, each with the prompt of the image before it: what"
        " images reach that have nothing to do with their prompts.",
    }


def _about_dinov2(origin: Origin) -> str:
    """What FD-DINOv2 is, and which weights saw the images; nothing without it."""
    if not (facts := origin.get("DINOv2")):
        return ""
    text = (
        f"Fréchet distance of the same images to the real ones by the features of {facts['flavour']} (Stein et al."
        f" 2023), weights {facts['weights']}, SHA-256 {origin['features SHA-256']['dinov2'][:12]}. It does not compare"
        " with FID."
    )
    few = f" {origin['count']:,} images for 1,024 features make a singular covariance and a large bias."
    return text + (few if origin["count"] <= 1024 else "")


def _about_parameters(results: Results) -> str:
    text = (
        "of the transformer that draws, without the tokenizer, which decodes for all: the teacher's, or the student's"
    )
    kinds = {row.get("type") for row in results["rows"]}
    return text + ("; DD + AR rows ask the teacher too, whose are not counted." if "DD + AR" in kinds else ".")


def _about_variance(results: Results) -> str:
    """Of which images the variance is."""
    return "of all images, whatever their prompts" if of_prompts(results) else "within a class, averaged over classes"


def _about_prompt_agreement(results: Results) -> str:
    """What counts as agreement, and what chance gives of it."""
    by_chance = [
        f"{row['name']} {row['prompt_agreement_of_others']:.1%}"
        for row in results["rows"]
        if "prompt_agreement_of_others" in row
    ]
    return (
        "share of images that are all that their prompts name (digit, weight, slant, place), by the scoring network and"
        f" by measuring ink; near a border between two words either counts. {ABOUT_CEILING}"
        f" Given other images' prompts, from half a part of 1,000 further on: {', '.join(by_chance)}."
    )


def _about_time(results: Results) -> str:
    origin = results["made"]
    at = origin["timing"]
    if not at["device"]:
        return ""
    return (
        f"time of one image, decoding included, on {at['device']}, {at['threads']} torch thread(s)"
        + "".join(f", {text}" for text in precisions(origin))
        + f": in steady state, the median of {at['calls']}, the samplers taking turns call by call"
        + (", each call as long as the GPU worked on it." if at.get("runs on") == "cuda" else ".")
        + f" {about_load(at['load'], at['cores'])}."
    )


def _teachers_time(results: Results) -> str:
    """The AR teacher's own time at batch 1, where it was measured."""
    times = [one["ms"] for one in (results.get("speed") or {"teacher": []})["teacher"] if one["batch"] == 1]
    return f", {ms(times[0])} ms" if times else ""


def about_load(load: MachineLoad, cores: int | None) -> str:
    """How busy others kept the machine meanwhile, without a full stop; whether that was too much."""
    if load["during"] is None:
        text = f"This system does not say what other processes did; its load average was {load['average']:.1f}"
    else:
        text = (
            f"Meanwhile others kept {load['during']:.2f} of the machine's {cores} cores busy, and {load['before']:.2f}"
            " in the second before"
        )
    text += f"; the GPU was at {load['gpu']:.0f} % before" if load["gpu"] is not None else ""
    return text + ("; so the machine was not quiet, and every time is too long" if load["busy"] else "")


def about_differences(results: Results) -> str:
    """What the differences between students are of, and when two rows are called indistinguishable."""
    of = "prompts" if of_prompts(results) else "labels"
    return (
        f"The rows were drawn for the same {of} from the same noise, so their images are pairs and much of their chance"
        " is common to both. The standard error is that of the difference itself: the jackknife of the table's errors,"
        " each group of rounds left out of both rows at once. It is of chance in these images alone, not of another"
        " training's. Two rows are indistinguishable if they differ by less than two standard errors, or by less than"
        " 1.3 % of the larger distance."
    )


def about_agreement(results: Results) -> str:
    """How near flow matching is to plain sampling."""
    agreement, title = results["agreement"], results["title"]
    assert agreement is not None
    return (
        f"FM teacher against AR teacher: {title} {agreement['fm_to_ar']:.4f} between the two;"
        f" {agreement['ar_to_ar']:.4f} between two AR draws (sample ids from 0 and from"
        f" {results['made']['count']:,}); ratio {agreement['ratio']:.2f}. Near 1, flow matching keeps the"
        " teacher's distribution as well as this many images can tell."
    )


def about_speeds(results: Results) -> str:
    """What the table of all batch sizes holds."""
    at = results["made"]["timing"]
    return (
        "Milliseconds per image, in brackets without decoding; medians. Every sampler was timed at every batch; a dash"
        f" did not fit into the device's memory. {about_load(at['load'], at['cores'])}."
    )


def about_encoder(results: Results) -> str:
    """What the text encoder takes, and what the table holds in which its time is added."""
    times = "; ".join(
        f"{ms(one['ms'])} ± {ms(one['ms_std'])} ms at batch {one['batch']}" for one in results["speed"]["encoder"]
    )
    return (
        f"The text encoder, in turns with the samplers, took a prompt {times}. With that in every round, the AR"
        " teacher's too, from prompts to images:"
    )


def about_training(results: Results) -> str:
    """What the curve over training was drawn with."""
    curve = results["curve"]
    assert curve is not None
    teachers = ", ".join(f"{name} {value:.2f}" for name, value in curve["teachers"].items())
    whose = " Of the recipe's own student alone." if results["made"].get("students") else ""
    return f"{results['title']} of {curve['count']:,} images at a time; at that count: {teachers}.{whose}"


def about_pairs(results: Results) -> str:
    """Which runs the scores over the count of pairs are from."""
    pair_sets, student = results["pair_sets"], results["made"]["student"]
    assert pair_sets is not None
    assert student is not None
    own = student["pairs_count"]
    others = "; ".join(f"{one['pairs']:,} pairs: {one['uri']}" for one in pair_sets["reports"])
    return (
        f"{results['title']} of {pair_sets['count']:,} images, of students that were distilled from the first pairs of"
        f" one set ({own:,} pairs: this run; {others})."
    )
