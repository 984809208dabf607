"""One line for people about each problem that pydantic finds."""

import difflib
from collections.abc import Sequence


def describe(problem: dict, known: Sequence[str]) -> str:
    """What is wrong with which key, what was given, what is allowed.

    Args:
        problem: One of ``ValidationError.errors()``.
        known: All dotted keys and section names.
    """
    key = ".".join(str(part) for part in problem["loc"][:2])        # deeper parts name items and union members
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; {_suggest(key, known)}"
        case "missing":
            return f"{key}: required, but not given"
        case "union_tag_invalid":
            tag = problem["ctx"]["tag"]
            known = ", ".join(sorted(part.strip(" '") for part in problem["ctx"]["expected_tags"].split(",")))
            return f"{key}.{problem['ctx']['discriminator'].strip(chr(39))} {tag!r} is unknown; known: {known}"
        case "value_error":
            return f"{key}: " * bool(key) + str(problem["ctx"]["error"])
        case _:
            return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, given {problem['input']!r}"


def _suggest(key: str, known: Sequence[str]) -> str:
    """What ``key`` may have been meant to be: a similar key beside it, the same name in another section, or a list."""
    section, dot, name = key.rpartition(".")
    beside = [k.removeprefix(section + dot) for k in known if k.rpartition(".")[0] == section]
    close = difflib.get_close_matches(name, beside, n=1)
    if close:
        return f"did you mean {section + dot}{close[0]}?"
    elsewhere = [k for k in known if k.endswith(f".{name}")]
    return f"did you mean {elsewhere[0]}?" if elsewhere else f"known: {', '.join(section + dot + b for b in beside)}"
