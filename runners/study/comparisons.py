"""Tables of a study that compare in pairs: remedies in training, at equal network calls, and while sampling."""

from runners.study.findings import Findings
from runners.study.page import Heading, Table, Text
from runners.study.pairs import difference, in_words, without_remedies

EXPLAINED = ("The differences below are of the same seeds of training with and without a remedy, ± their standard "
             "error. Below 0 the remedy helps. Bold: the 95% interval of Student's t over the seeds leaves out 0; it "
             "is not corrected for the number of comparisons, of which one in twenty is bold by chance.")


def compared(findings: Findings) -> list:
    """Every remedy in pairs; nothing where there is one seed, or no pair."""
    parts = [*training_part(findings), *sampling_part(findings)] if len(findings.job.study.seeds) > 1 else []
    return [Heading("Remedies in pairs"), Text(EXPLAINED), *parts] if parts else []


def training_part(findings: Findings) -> list:
    """Each run against the first, sampler by sampler, at equal images and at equal network calls."""
    base, *others = findings.runs
    keys = [key for key in findings.values if key[2] == findings.budget]
    same = [(key, {run: key for run in others}) for key in keys]
    calls = {run: findings.job.configs[f"{run}-{findings.job.study.seeds[0]}"].loss.calls for run in others}
    equal = [(key, {run: (*key[:2], findings.budget // calls[run]) for run in others}) for key in keys]
    dearer = [run for run in others if calls[run] > 1]
    what = f"{findings.name} minus that of {base}"
    return [*_against_base(findings, base, others, same, "Remedies in training, at equal images", what),
            *_against_base(findings, base, dearer, equal, "Remedies in training, at equal network calls",
                           f"{what}, which has seen as many images more as the run takes calls for each")]


def _against_base(findings: Findings, base: str, runs: list[str], pairs: list, title: str, what: str) -> list:
    rows, bold, verdicts = [], set(), {run: {} for run in runs}
    for key, theirs in pairs:
        found = [difference(findings.by_seed(theirs[run], run), findings.by_seed(key, base)) for run in runs]
        if any(found):
            _add_row(findings, rows, bold, [key[0], str(key[1])], found)
            for run, each in zip(runs, found, strict=True):
                if each:
                    verdicts[run][f"{key[0]} in {key[1]} steps"] = each.verdict
    return _part(title, what, ["sampler", "steps", *runs], rows, bold, verdicts)


def sampling_part(findings: Findings) -> list:
    """Each sampler that has a remedy against the same without, run by run."""
    rows, bold, verdicts = [], set(), {}
    keys = [key for key in findings.values if key[2] == findings.budget]
    plain = {str(findings.settings(key)): key for key in keys}
    for key in keys:
        settings = findings.settings(key)
        other = plain.get(str(without_remedies(settings)))
        if other in (None, key):
            continue
        found = [difference(findings.by_seed(key, run), findings.by_seed(other, run)) for run in findings.runs]
        if any(found):
            _add_row(findings, rows, bold, [key[0], str(key[1])], found)
            for run, each in zip(findings.runs, found, strict=True):
                if each:
                    verdicts.setdefault(key[0], {})[f"{run} in {key[1]} steps"] = each.verdict
    return _part("Remedies while sampling", f"{findings.name} minus that of the same sampler without the remedy",
                 ["sampler", "steps", *findings.runs], rows, bold, verdicts)


def _add_row(findings: Findings, rows: list, bold: set, names: list[str], found: list) -> None:
    bold |= {(len(rows), len(names) + i) for i, each in enumerate(found)
             if each and each.verdict != "not distinguishable"}
    rows.append([*names, *(f"{findings.number(each.mean, '+')} ± {findings.number(each.error)}" if each else ""
                           for each in found)])


def _part(title: str, what: str, header: list[str], rows: list, bold: set, verdicts: dict[str, dict]) -> list:
    if not rows:
        return []
    return [Heading(title), Text(f"{what}."), Table(header, rows, bold),
            *(Text(in_words(name, found)) for name, found in verdicts.items() if found)]
