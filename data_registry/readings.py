"""What a written value says: ages, sexes, field strengths, scanners and licences as databases write them.

One rule for all: a clear value is taken; a clear value in another spelling is taken, with a note; an unclear one becomes null, with a note.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

OLDEST_YEARS = 110
PER_YEAR = {"year": 1.0, "month": 12.0, "week": 365.25 / 7, "day": 365.25}
FIELD_STRENGTHS_TESLA = (0.064, 0.2, 0.35, 0.5, 0.55, 1.0, 1.5, 2.0, 3.0, 4.0, 4.7, 7.0, 9.4, 10.5, 11.7)
ROUNDED_TO_TESLA = (1.0, 1.5, 3.0, 7.0)
"""Nominal strengths that a value near them stands for; 3.95 is not among them, as machines sold as 3 T and as 4 T both write it."""
NEAR = 0.04
"""How near, as a share of the nominal value: Siemens's 2.89 T stands for 3."""
_EMPTY = {"", "n/a", "na", "nan", "none", "null", "unknown", "-", "?"}
_SEXES = {"f": "F", "female": "F", "woman": "F", "girl": "F", "m": "M", "male": "M", "man": "M", "boy": "M"}

_MANUFACTURERS = {
    "siemens": "Siemens", "philips": "Philips", "phillips": "Philips", "phllips": "Philips", "ge": "GE", "g.e.": "GE", "gems": "GE",
    "general electric": "GE", "generalelectric": "GE", "toshiba": "Canon", "canon": "Canon", "hitachi": "Hitachi", "fujifilm": "Fujifilm",
    "uih": "United Imaging", "united imaging": "United Imaging", "shanghai united imaging": "United Imaging", "bruker": "Bruker",
    "hyperfine": "Hyperfine", "esaote": "Esaote", "neusoft": "Neusoft", "varian": "Varian", "agilent": "Agilent", "marconi": "Marconi",
    "picker": "Picker", "elscint": "Elscint",
}  # fmt: skip
MANUFACTURERS = frozenset(_MANUFACTURERS.values())
"""The spellings that :func:`canonical_manufacturer` makes."""


class Reading(NamedTuple):
    """A value for the table; if it is not simply what was written, of which kind the conflict is and what was done."""

    value: float | str | None
    kind: str | None = None
    done: str | None = None


def is_empty(written: object) -> bool:
    """Nothing, or one of the words for it; BIDS's is n/a."""
    return written is None or str(written).strip().casefold() in _EMPTY


def age_unit(declared: object) -> str | None:
    """The unit of ``PER_YEAR`` that a description's ``Units`` means; None if it means none of them.

    >>> age_unit("Years"), age_unit("months at scan"), age_unit("n/a")
    ('year', 'month', None)
    """
    match = re.match("(year|month|week|day|yrs?\\b)", str(declared or "").strip().casefold())
    return None if match is None else "year" if match[1].startswith("y") else match[1]


def read_age(written: object, unit: str = "year") -> Reading:
    """Years, from a number in ``unit`` or from DICOM's ``063Y``.

    >>> read_age("36", "month").value, read_age("006M").value, read_age("31.5")
    (3.0, 0.5, Reading(value=31.5, kind=None, done=None))
    >>> read_age("89+").kind, read_age("240").done
    ('age unclear', 'null; in months it would be 20 years')
    """
    if is_empty(written):
        return Reading(None, "missing value", "null")
    text = str(written).strip()
    dicom = re.fullmatch(r"(\d{3})([DWMY])", text)
    try:
        number = float(dicom[1] if dicom else text)
    except ValueError:
        return Reading(None, "age unclear", "null; one number is wanted")
    if not math.isfinite(number):
        return Reading(None, "age unclear", "null; a finite number is wanted")
    if dicom:
        unit = {"D": "day", "W": "week", "M": "month", "Y": "year"}[dicom[2]]
    years = number / PER_YEAR[unit]
    if not 0 <= years <= OLDEST_YEARS:
        months = unit == "year" and OLDEST_YEARS < years <= OLDEST_YEARS * 12
        return Reading(None, "age impossible", f"null; in months it would be {number / 12:.3g} years" if months else "null")
    if unit != "year":
        return Reading(years, "unit", f"{unit}s made years: {years:.4g}")
    return Reading(years, "spelling", f"read as {years:g}") if dicom else Reading(years)


def read_sex(written: object, codes: Mapping[str, str]) -> Reading:
    """F or M, from the words for them or from a declared code, which goes first.

    >>> read_sex("male", {}).value, read_sex("2", {}).value, read_sex("2", {"1": "M", "2": "F"}).value
    ('M', None, 'F')
    """
    if is_empty(written):
        return Reading(None, "missing value", "null")
    text = str(written).strip()
    value = codes.get(text) or codes.get(text.removesuffix(".0"))
    if value:
        return Reading(value) if value == text else Reading(value, "spelling", f"read as {value}, by the declared code")
    value = _SEXES.get(text.casefold())
    if value is None:
        return Reading(None, "sex unclear", "null; F or M, or a declared code, is wanted")
    return Reading(value) if value == text else Reading(value, "spelling", f"read as {value}")


def sex_codes(levels: object) -> dict[str, str]:
    """Codes from the ``Levels`` of a column's description.

    >>> sex_codes({"1": "male", "2": "Female", "3": "other"})
    {'1': 'M', '2': 'F'}
    """
    meanings = levels.items() if isinstance(levels, Mapping) else ()
    return {str(code): _SEXES[str(word).strip().casefold()] for code, word in meanings if str(word).strip().casefold() in _SEXES}


def read_field_strength(written: object) -> Reading:
    """Tesla. DICOM has no other unit, so a bare 15000 is not taken for gauss; with its unit it is.

    >>> read_field_strength(2.89362).value, read_field_strength("3T").value, read_field_strength("15000 G").value
    (3.0, 3.0, 1.5)
    >>> read_field_strength(3.95064)
    Reading(value=None, kind='field strength unclear', done='not taken; no nominal value is near enough')
    """
    if is_empty(written):
        return Reading(None)
    match = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*(T|tesla|mT|G|gauss)?\s*", str(written), re.IGNORECASE)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if not number > 0:  # NaN too
        return Reading(None, "field strength unclear", "not taken; a number in tesla is wanted")
    unit = (match[2] or "").casefold()
    tesla = number / {"mt": 1e3, "g": 1e4, "gauss": 1e4}.get(unit, 1.0)
    if any(math.isclose(tesla, nominal, rel_tol=1e-4) for nominal in FIELD_STRENGTHS_TESLA):
        tesla = next(nominal for nominal in FIELD_STRENGTHS_TESLA if math.isclose(tesla, nominal, rel_tol=1e-4))
        return Reading(tesla, "unit", f"{tesla:g} T taken") if unit else Reading(tesla)
    near = next((nominal for nominal in ROUNDED_TO_TESLA if abs(tesla - nominal) <= NEAR * nominal), None)
    if near is not None:
        return Reading(near, "rounded", f"{near:g} T taken")
    hint = "no nominal value is near enough" if tesla < 15 else f"in gauss it would be {tesla / 1e4:.3g} T, in millitesla {tesla / 1e3:.3g} T"
    return Reading(None, "field strength unclear", f"not taken; {hint}")


def canonical_licence(written: str | None) -> str | None:
    """One spelling a licence; what is not known stays as it came.

    >>> [canonical_licence(name) for name in ("CCo", "CC0 1.0", "PDDL", "CC BY-NC 4.0", "cc-by", "own")]
    ['CC0', 'CC0', 'PDDL', 'CC-BY-NC-4.0', 'CC-BY', 'own']
    >>> canonical_licence("made available under the Public Domain Dedication and License v1.0, whose full text can be found at")
    'PDDL'
    """
    if is_empty(written):
        return None
    text = " ".join(str(written).split())
    if re.search(r"\bpddl\b|public domain dedication and licen[cs]e", text, re.IGNORECASE):
        return "PDDL"
    if re.match(r"cc[ -]?[0o]\b|creative commons (zero|cc0)", text, re.IGNORECASE):
        return "CC0"
    match = re.fullmatch(r"cc[ -]by((?:[ -](?:nc|nd|sa))*)(?:[ -]v?(\d\.\d))?( international)?", text, re.IGNORECASE)
    if match is None:
        return text
    return "CC-BY" + match[1].upper().replace(" ", "-") + (f"-{match[2]}" if match[2] else "")


@functools.cache
def canonical_manufacturer(name: str | None) -> str | None:
    """One spelling a maker; a name that is not known stays as it came.

    >>> canonical_manufacturer("SIEMENS"), canonical_manufacturer("GE MEDICAL SYSTEMS"), canonical_manufacturer("Gefen")
    ('Siemens', 'GE', 'Gefen')
    """
    lower = " ".join((name or "").replace("_", " ").casefold().split())
    return next((maker for alias, maker in _MANUFACTURERS.items() if re.match(rf"{re.escape(alias)}(?!\w)", lower)), name)


def letters_of(name: str) -> str:
    """Letters and digits alone, in lower case and without accents: spellings of one name have the same.

    >>> letters_of("Université de Montréal"), letters_of("Trio_Tim")
    ('universitedemontreal', 'triotim')
    """
    return re.sub(r"[\W_]", "", folded(name))


def letters_of_model(model: str) -> str:
    """The same of a scanner's model, without the maker's own word for all of a family.

    >>> letters_of_model("MAGNETOM Trio_Tim"), letters_of_model("DISCOVERY MR750"), letters_of_model("Discovery")
    ('triotim', 'mr750', 'discovery')
    """
    return letters_of(re.sub(r"(magnetom|discovery)(?=[\W_]*[^\W_])", "", model.casefold()))


@functools.cache
def folded(name: str) -> str:
    """In lower case and without accents.

    >>> folded("Montréal")
    'montreal'
    """
    return "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter)).casefold()
