"""How a report's images were drawn, scored and timed, in sentences for whoever wants the same numbers."""

from __future__ import annotations

from pipeline.report.origin import Origin, ReferenceOrigin, StudentOrigin, TeacherOrigin, Timing
from pipeline.report.results import Results

RESIZED = {  # what Inception sees, by flavour
    "torch-fidelity": "TensorFlow 1's bilinear resize to 299 pixels, (x - 128) / 128",
    "pytorch-fid": "torch's bilinear resize to 299 pixels without antialiasing, (x - 127.5) / 127.5",
}

ENCODED_BEFORE = (
    " Among these inputs are the encoded prompts; the text encoder took a turn of its own in every round, and where its"
    " time is added, that is said."
)


def protocol(results: Results) -> list[tuple[str, str]]:
    """(what, sentences) for drawing, scoring, timing and the run itself; what a report does not know is left out."""
    origin = results["made"]
    parts = [("drawn", _drawn(origin)), ("scored", _scored(origin)), ("timed", _timed(results))]
    return [*parts, ("written", _written(origin))]


def _drawn(origin: Origin) -> str:
    classes = f" modulo {origin['classes']}" if "classes" in origin else " modulo the number of classes"
    given = _prompt_of_sample(origin) if "prompts" in origin else f"class i{classes}, so classes are balanced"
    text = (
        f"{origin['count']:,} images a sampler. Sample i, from 0, has {given}, and"
        f" the noise and uniform draws of (seed {origin['seed']}, i): the same for every sampler, batch and number of"
        " actors."
    )
    text += _about_prompts(origin)
    if who := [f"the {network}" for network in precisions(origin)]:
        text += f" {' and '.join(who)}.".replace(" the", " The", 1)
    if guidance := (origin.get("teacher") or {}).get("filter"):
        text += f" Guidance and filter: {', '.join(f'{k} {v}' for k, v in guidance.items())}."
    return text


def _prompt_of_sample(origin: Origin) -> str:
    facts = origin["prompts"]
    column = f", column {facts['column']}" if facts["column"] else ""
    first = f" from row {facts['skip']:,} on" if facts["skip"] else ""
    chosen = ", rows without an image left out" if "chosen" in facts else ""
    return f"prompt i of {facts['uri']}{column}{first}{chosen}"


def _about_prompts(origin: Origin) -> str:
    """How many prompts are new to the student, and what becomes of them; nothing of classes."""
    if "prompts" not in origin:
        return ""
    repeated = origin["prompts"]["also among the pairs' prompts"]
    text = " Of which prompts pairs were made is not known here: captions.uri is not set."
    if repeated is not None:
        text = (
            f" {repeated:,} of {origin['count']:,} prompts occur among those of the pairs, capital letters and blanks"
            " aside."
        )
    if encoder := origin.get("encoder"):
        clean = f"rewritten by the rules {encoder['clean']} and " if encoder["clean"] else ""
        text += (
            f" Prompts are {clean}encoded by {encoder['uri']} in {encoder['precision']}, at most"
            f" {encoder['length']} tokens of each."
        )
    return text


def _scored(origin: Origin) -> str:
    text = "Images are rounded to uint8 as PNG savers do, floor(clamp(127.5 y + 128, 0, 255)). "
    if origin.get("pixels across an image"):
        text += f"They are scored at {origin['pixels across an image']} pixels across. "
    if flavour := origin.get("flavour"):
        each = list(RESIZED) if flavour == "both" else [flavour]
        text += f"Inception sees them after {'; '.join(f'{RESIZED[one]} ({one})' for one in each)}. "
    else:
        text += "The digits scorer sees them as they are, at x / 127.5 - 1, without a resize. "
    text += "It works in float32; means and unbiased covariances are float64 sums, merged in the order of the ids."
    if clip := origin.get("CLIP"):
        model, reads = (origin["features SHA-256"][key][:12] for key in ("clip", "clip reads"))
        text += (
            f" CLIP, {clip['model']} (SHA-256 of its weights {model}, of tokenizer and preparation {reads}), sees them"
            f" resized bicubically as PIL does, and scores them: {clip['convention']}, cut to the tokens that it reads."
        )
    if further := origin.get("DINOv2"):
        text += f" For FD-DINOv2 they are seen by {further['flavour']}, in float32 too."
    facts = origin.get("reference")
    if facts and facts.get("uri"):
        count = facts.get("count") or facts.get("images")
        statistics = "statistics made here by the same network" if facts["statistics"] == "made here" else "statistics"
        text += f" Compared with {facts['uri']}: {statistics}" + (f" of {count:,} images." if count else ".")
        text += _about_real_images(facts)
    return text


def _about_real_images(facts: ReferenceOrigin) -> str:
    """Whose prompts the real images have, which were left out and how they were cut; nothing of classes."""
    text = ""
    if "described" in facts:
        whose = "They are those of the prompts that are drawn, in their order"
        text += f" {whose if facts['described'] else 'Which prompts they have is not known here'}."
    if left_out := facts.get("rows without an image"):
        text += f" {left_out:,} rows there have no image and are left out."
    return text + (f" Real images of another size are cut: {facts['cut']}." if "cut" in facts else "")


def _timed(results: Results) -> str:
    timing: Timing = results["made"]["timing"]
    if not timing["device"]:
        return "Speed was not measured."
    day = f" on {timing['measured']}" if timing.get("measured") else ""
    return (
        f"Measured{day} in one process on {timing['device']}, {timing['threads']} torch thread(s) of"
        f" {timing['cores']} cores, from inputs that were made beforehand to decoded images; the median of"
        f" {timing['calls']}. All samplers run at every batch, and a speed-up is over the AR teacher at the same one."
    ) + (ENCODED_BEFORE if "encoder" in results.get("speed", {}) else "")


def _written(origin: Origin) -> str:
    facts = origin.get("report")
    if not facts:
        return "Written by this package."
    text = f"Written {facts['written']}" if facts.get("written") else "Written"
    text += f" by distilled-decoding {facts['version']}" if facts.get("version") else " by this package"
    if facts.get("commit"):
        text += f", commit {facts['commit']}" + (" with files that differ from it" if facts.get("changed") else "")
    return text + (f", with: {facts['command']}" if facts.get("command") else ".")


def precisions(origin: Origin) -> list[str]:
    """Each network that drew and its precision, where the report knows it: "teacher in bf16"."""
    networks: dict[str, TeacherOrigin | StudentOrigin | None] = {
        "teacher": origin.get("teacher"),
        "student": origin.get("student"),
    }
    return [f"{who} in {one['precision']}" for who, one in networks.items() if one and one.get("precision")]
