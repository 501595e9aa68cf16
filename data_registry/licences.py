"""May weights be shared, given the licences of the data that trained them? The strictest licence decides.

Weights are treated here as a work derived from the scans and labels. Not every lawyer agrees, so the answer errs on the strict side; it is no
legal advice. What the catalogue says about weights (``redistribute.weights``) overrides the table below. A licence that no document confirms
counts as not known.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "under conditions", "not known", "no"]
STRICTNESS: tuple[Answer, ...] = ("yes", "under conditions", "not known", "no")
ATTRIBUTION, NON_COMMERCIAL, SHARE_ALIKE, NO_DERIVATIVES = "attribution", "non-commercial use", "share alike", "no derivatives"
CONDITIONS: dict[str, tuple[str, ...]] = {
    "cc0": (),
    "pddl": (),
    "unlicense": (),
    "mit": (ATTRIBUTION,),
    "bsd-2-clause": (ATTRIBUTION,),
    "bsd-3-clause": (ATTRIBUTION,),
    "apache": (ATTRIBUTION,),
    "odc-by": (ATTRIBUTION,),
    "odbl": (ATTRIBUTION, SHARE_ALIKE),
    "cc-by": (ATTRIBUTION,),
    "cc-by-sa": (ATTRIBUTION, SHARE_ALIKE),
    "cc-by-nc": (ATTRIBUTION, NON_COMMERCIAL),
    "cc-by-nc-sa": (ATTRIBUTION, NON_COMMERCIAL, SHARE_ALIKE),
    "cc-by-nd": (ATTRIBUTION, NO_DERIVATIVES),
    "cc-by-nc-nd": (ATTRIBUTION, NON_COMMERCIAL, NO_DERIVATIVES),
}
"""What a licence asks for, by its identifier without version. On others (agreements, terms of use) the catalogue decides."""
ASK = "ask its owners, and note their answer as redistribute.weights with its source"
NO_ADVICE = "Weights are taken for a work that derives from the scans, the strict reading. This is no legal advice."


@dataclass(frozen=True)
class Verdict:
    """May weights be shared, on which conditions, and why not or what is missing: a reason for each database that stands in the way."""

    answer: Answer
    conditions: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    alike: str | None = None
    """The licence, without version, that derived works must have too."""


def identifier(licence: str) -> str:
    """A licence's name as :data:`CONDITIONS` has it: without version, whatever the case.

    >>> identifier("CC-BY-NC-SA-3.0"), identifier("CC BY 4.0"), identifier("CC0-1.0"), identifier("Apache-2.0")
    ('cc-by-nc-sa', 'cc-by', 'cc0', 'apache')
    """
    return re.sub(r"-v?\d+(\.\d+)*$", "", re.sub(r"[\s_]+", "-", licence.strip().casefold()))


def judge(name: str, licence: str | None, *, confirmed: bool = True, weights: bool | None = None) -> Verdict:
    """The verdict on one database, from its licence, whether a document confirms it, and what the catalogue says about its ``weights``.

    >>> judge("ixi", "CC-BY-SA-3.0").conditions
    ('attribution', 'share alike')
    >>> judge("adni", "ADNI data use agreement").reasons
    ("adni: 'ADNI data use agreement' does not say; ask its owners, and note their answer as redistribute.weights with its source",)
    """
    if weights is False:
        return Verdict("no", reasons=(f"{name}: its terms forbid it ({licence or 'no licence is known'})",))
    if weights is None and licence is None:
        return Verdict("not known", reasons=(f"{name}: no licence is known; {ASK}",))
    if weights is None and not confirmed:
        return Verdict("not known", reasons=(f"{name}: {licence!r}, which no document confirms; {ASK}",))
    bare = (licence or "").partition(" unless otherwise specified")[0]
    asked = CONDITIONS.get(identifier(bare))
    if asked is None:
        if weights:
            return Verdict("under conditions" if licence else "yes", (f"the terms of {name} ({licence})",) if licence else ())
        return Verdict("not known", reasons=(f"{name}: {licence!r} does not say; {ASK}",))
    if NO_DERIVATIVES in asked and not weights:
        return Verdict("no", reasons=(f"{name}: {licence} allows no derived works",))
    asked += (f"what parts of {name} specify otherwise",) if licence != bare else ()
    return Verdict("under conditions" if asked else "yes", asked, alike=identifier(bare) if SHARE_ALIKE in asked else None)


def strictest(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on all databases together: the strictest answer, all conditions, all reasons. Without any it is "not known".

    >>> strictest([judge("la5c", "CC0"), judge("ixi", "CC-BY-SA-3.0"), judge("hbn", "CC-BY-NC-4.0")]).conditions
    ('attribution', 'share alike', 'non-commercial use')
    >>> strictest([judge("ixi", "CC-BY-SA-3.0"), judge("abide1", "CC-BY-NC-SA-3.0")]).reasons
    ('cc-by-nc-sa and cc-by-sa each want derived works under themselves alone',)
    """
    verdicts = sorted(verdicts, key=lambda verdict: -STRICTNESS.index(verdict.answer))
    if not verdicts:
        return Verdict("not known", reasons=("what trained it is not noted",))
    answer, reasons = verdicts[0].answer, [reason for verdict in verdicts for reason in verdict.reasons]
    alike = sorted({verdict.alike for verdict in verdicts} - {None})
    if len(alike) > 1:
        reasons.append(f"{' and '.join(alike)} each want derived works under themselves alone")
        answer = max(answer, "not known", key=STRICTNESS.index)
    conditions = tuple(dict.fromkeys(condition for verdict in verdicts for condition in verdict.conditions))
    return Verdict(answer, conditions, tuple(reasons), alike[0] if len(alike) == 1 else None)


def in_words(verdict: Verdict) -> str:
    """The answer in a line, without its reasons.

    >>> in_words(judge("ixi", "CC-BY-SA-3.0")), in_words(judge("x", None))
    ('under conditions: attribution, share alike (cc-by-sa)', 'not known')
    """
    if verdict.answer != "under conditions":
        return verdict.answer
    named = [f"{SHARE_ALIKE} ({verdict.alike})" if condition == SHARE_ALIKE and verdict.alike else condition for condition in verdict.conditions]
    return f"under conditions: {', '.join(named)}"
