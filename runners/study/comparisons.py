"""Tables of a study that compare in pairs: remedies in training, at equal network calls, and while sampling."""

from collections.abc import Iterable
from math import isfinite

from runners.study.findings import Findings
from runners.study.page import Heading, Table, Text
from runners.study.pairs import UNDECIDED, difference, in_words, without_remedies

EXPLAINED = ("The differences below are of the same seeds of training with and without a remedy, ± their standard "
             "error. Below 0 the remedy helps. Bold: the 95% interval of Student's t over the seeds leaves out 0; it "
             "is not corrected for the number of comparisons, of which one in twenty is bold by chance.")
SHARED = (" All training seeds share the seeds of their images: how much other images would move a number is not in "
          "these errors.")


def compared(findings: Findings) -> list:
    """Every remedy in pairs; nothing where there is one seed, or no pair."""
    parts = [*training_part(findings), *sampling_part(findings)] if len(findings.job.study.seeds) > 1 else []
    shared = SHARED if findings.job.study.image_seeds == "shared" else ""
    return [Heading("Remedies in pairs"), Text(EXPLAINED + shared), *parts] if parts else []


def training_part(findings: Findings) -> list:
    """Each run against the first, sampler by sampler, at equal images and at equal network calls."""
    (base, *others), budget, job = findings.runs, findings.budget, findings.job
    calls = {run: job.configs[f"{run}-{job.study.seeds[0]}"].loss.calls for run in findings.runs}
    dearer = [run for run in others if calls[run] > calls[base]]
    what = f"{findings.name} minus that of {base}"

    def against_base(images: dict[str, int]):
        for label, steps, seen in findings.values:
            if seen == budget:
                without = findings.by_seed((label, steps, budget), base)
                yield label, steps, {run: difference(findings.by_seed((label, steps, seen), run), without)
                                     for run, seen in images.items()}

    return [*_part(findings, "Remedies in training, at equal images", what,
                   against_base(dict.fromkeys(others, budget)), by_run=True),
            *_part(findings, "Remedies in training, at equal network calls",
                   f"{what}, which has seen as many times more images as the run takes more calls for each",
                   against_base({run: budget * calls[base] // calls[run] for run in dearer}), by_run=True)]


def sampling_part(findings: Findings) -> list:
    """Each sampler that has a remedy against the same without, run by run."""
    keys = {str(findings.settings(key)): key for key in findings.values if key[2] == findings.budget}

    def against_plain():
        for key in keys.values():
            plain = keys.get(str(without_remedies(findings.settings(key))), key)
            if plain != key:
                yield *key[:2], {run: difference(findings.by_seed(key, run), findings.by_seed(plain, run))
                                 for run in findings.runs}

    return _part(findings, "Remedies while sampling", f"{findings.name} minus that of the same sampler without the "
                 "remedy", against_plain(), by_run=False)


def _part(findings: Findings, title: str, what: str, found: Iterable[tuple], by_run: bool) -> list:
    """A table of (sampler, steps, differences by run), and a line in words for each run, or else each sampler."""
    found = [each for each in found if any(each[2].values())]
    rows, bold, verdicts = [], set(), {}
    for label, steps, differences in found:
        for column, (run, each) in enumerate(differences.items(), 2):
            if each:
                name, place = (run, label) if by_run else (label, run)
                verdicts.setdefault(name, {})[f"{place} in {steps} steps"] = each.verdict
                if each.verdict != UNDECIDED:
                    bold.add((len(rows), column))
        rows.append([label, str(steps), *(_shown(findings, each) for each in differences.values())])
    if not rows:
        return []
    return [Heading(title), Text(f"{what}."), Table(["sampler", "steps", *found[0][2]], rows, bold),
            *(Text(in_words(*each)) for each in verdicts.items())]


def _shown(findings: Findings, found) -> str:
    if not found:
        return ""
    spread = f"± {findings.number(found.error)}" if isfinite(found.error) else "(one pair)"
    return f"{findings.number(found.mean, '+')} {spread}"
