"""What the catalogue says of a database and of its sites; an error names the field, what came and what was wanted."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

NAME_PATTERN = r"[A-Za-z0-9_-]+"


def _plain(name: str) -> str:
    if name != name.strip() or not name.isprintable():
        raise ValueError("one line without blanks at its ends is wanted")
    return name


def _address(text: str) -> str:
    if not re.fullmatch(r"https?://\S+|doi:10\.\d{4,9}/\S+|letter \d{4}-\d\d-\d\d, \S.*", text):
        raise ValueError("https://…, doi:10.…/… or 'letter YEAR-MONTH-DAY, who wrote it, who keeps it' is wanted")
    return text


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[Text, AfterValidator(_plain)]
"""Text that is compared, so an extra blank would make another place of it."""
Count = Annotated[int, Strict(), Field(ge=0, le=10_000_000)]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Tesla = Annotated[Number, Field(gt=0, lt=12)]
Years = Annotated[Number, Field(ge=0, le=120)]
Address = Annotated[str, AfterValidator(_address)]
"""Of a document that can be cited. An owner's letter is cited by its date, its author and who keeps it."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteRule(_Entry):
    """How a scan of a database gets its site; exactly one of the four."""

    participants: Name | None = None
    """A column of participants.tsv."""
    sidecar: Name | None = None
    """A field of the T1w's JSON sidecar."""
    prefix: Text | None = None
    """A regular expression whose first group, in the subject's label, is the site."""
    single: Name | None = None
    """The only site."""

    @model_validator(mode="after")
    def _exactly_one(self) -> "SiteRule":
        if sum(value is not None for value in self.__dict__.values()) != 1 or len(self.model_fields_set) != 1:
            raise ValueError("exactly one of participants, sidecar, prefix, single is wanted")
        if self.prefix is not None:
            try:
                groups = re.compile(self.prefix).groups
            except re.error as error:
                raise ValueError(f"a regular expression in prefix is wanted ({error})") from None
            if groups < 1:
                raise ValueError("a regular expression with a group, the site, in prefix is wanted")
        return self


class Ages(_Entry):
    """At scan, in years."""

    mean: Years | None = None
    sd: Years | None = None
    min: Years | None = None
    max: Years | None = None


class Sexes(_Entry):
    """Numbers of people; whoever is stated as neither F nor M is counted in neither."""

    F: Count | None = None
    M: Count | None = None


class Redistribution(_Entry):
    """May they be passed on? Null: no document says."""

    images: Flag | None = None
    labels: Flag | None = None
    weights: Flag | None = None


class LabelSource(_Entry):
    """What made the labels that come with a database."""

    source: Text
    version: Text | None = None
    route: Text | None = None
    """Where they are fetched from, if not with the images: a folder of FreeSurfer subjects that a program can read."""
    subject: Text | None = None
    """A regular expression that matches the whole name of a subject's folder there; its first group is the subject's label here."""

    @model_validator(mode="after")
    def _leads_somewhere(self) -> "LabelSource":
        if (self.route is None) != (self.subject is None):
            raise ValueError("route and subject are wanted both, or neither")
        try:
            groups = re.compile(self.subject or "()").groups
        except re.error as error:
            raise ValueError(f"subject is no regular expression ({error}); one is wanted") from None
        if groups < 1:
            raise ValueError("a regular expression with a group, the subject's label, in subject is wanted")
        return self


class LodBrainRow(_Entry):
    """A row of LOD-Brain's published table of 78 databases, which is a database here, or some of its sites."""

    scans: Count
    sites: list[Name] | None = None
    """Null: the whole database."""


class _Described(_Entry):
    """What is known of a database and of a site alike."""

    subjects: Count | None = None
    scans: Count | None = None
    """T1w scans to expect."""
    age_years: Ages | None = None
    sexes: Sexes | None = None
    note: Text | None = None


class Site(_Described):
    """A site as its database names it."""

    place: Name
    """The institution, the same name across databases."""
    country: Name | None = None
    """Null where the database has one country."""
    folders: list[Name] = []
    """The names of its folders on the route, if they differ from its own."""
    scanner: Name | None = None
    """One machine at a place, the same name across databases; null if unknown."""
    manufacturer: Name | None = None
    model: Name | None = None
    """As DICOM's ManufacturerModelName, without the maker's "MAGNETOM" or "DISCOVERY"."""
    field_strength_tesla: Tesla | None = None
    voxel_mm: Annotated[list[Annotated[Number, Field(gt=0, lt=20)]], Field(min_length=3, max_length=3)] | None = None
    """Of the T1w as scanned: in plane, in plane, between slices."""


class SamePeople(_Entry):
    """Another database that has scans of people of this one."""

    database: str
    subject: str | None = None
    """A regular expression that matches the whole label of such a subject here; null if nobody published how the names match."""
    theirs: str | None = None
    """Their label there, with ``\\1`` … for the groups of ``subject``."""

    @model_validator(mode="after")
    def _names_match(self) -> "SamePeople":
        if (self.subject is None) != (self.theirs is None):
            raise ValueError("subject and theirs are wanted both, or neither")
        try:
            groups = re.compile(self.subject or "").groups
            re.compile("()" * groups).match("").expand(self.theirs or "")
        except (re.error, IndexError) as error:
            raise ValueError(f"subject is no regular expression, or theirs has a group that it lacks ({error})") from None
        return self


class Database(_Described):
    """A database and its sites."""

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    """As its folder is called."""
    title: Text
    corpus: Flag = True
    """False for test data, which the catalogue's figures leave out."""
    used_by: list[Literal["LOD-Brain", "FastSurferVINN", "NeuroNet"]] = []
    """Papers whose corpus it belongs to."""
    countries: list[Name] = []
    licence: Name | None = None
    access: Literal["open", "registration", "agreement"] | None = None
    route: Text | None = None
    """Where the images are got: S3 prefix, OpenNeuro number, portal."""
    redistribute: Redistribution = Redistribution()
    state: Literal["available", "embargoed", "withdrawn"] | None = None
    citation: Text | None = None
    doi: Annotated[str, Field(pattern=r"^10\.\d{4,9}/\S+$")] | None = None
    """Of the paper to cite."""
    labels: LabelSource | None = None
    defaced: Flag | None = None
    family_column: Name | None = None
    """The column of participants.tsv that relatives share; null if the database has none."""
    sex_codes: dict[Text, Literal["F", "M"]] = {}
    """Codes that participants.tsv uses instead of F, M or words for them; e.g. ``{"1": M, "2": F}``."""
    same_people: tuple[SamePeople, ...] = ()
    """Other databases with scans of its people; it is enough that one of the two says so."""
    site_rule: SiteRule
    sites: Annotated[dict[Name, Site], Field(min_length=1)]
    lod_brain: dict[Text, LodBrainRow] = {}
    """Rows of LOD-Brain's table that stand for this database or its sites, by id."""
    source: Text | None = None
    """Where everything that ``sources`` does not name was read."""
    documents: dict[Text, Address] = {}
    """Addresses of what was read, by a short name."""
    sources: dict[Text, Text] = {}
    """Field → document; ``sites.*.model`` speaks of all sites, ``sites.NYU.model`` of one; a letter answers for ``redistribute.weights`` alone."""
    unverified: list[Text] = []
    """Fields, written as in ``sources``, whose values no document at hand confirms."""
    known: Flag = True
    """False for a database that is not in the catalogue."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Database":
        if self.site_rule.single is not None and self.site_rule.single not in self.sites:
            raise ValueError(f"site_rule.single {self.site_rule.single!r} is no site; one of {_some(self.sites)} is wanted")
        for row, content in self.lod_brain.items():
            for site in content.sites or ():
                if site not in self.sites:
                    raise ValueError(f"lod_brain.{row}.sites names {site!r}, which is no site; one of {_some(self.sites)} is wanted")
        owners: dict[str, str] = {}
        for name, site in self.sites.items():
            for folder in {one.casefold() for one in (name, *site.folders)}:
                if owners.setdefault(folder, name) != name:
                    raise ValueError(f"sites.{name}.folders has {folder!r}, which is {owners[folder]}; a folder of one site is wanted")
            if site.country and self.countries and site.country not in self.countries:
                raise ValueError(f"sites.{name}.country is {site.country!r}; one of the countries {', '.join(self.countries)} is wanted")
        return self

    def country_of(self, site: str) -> str | None:
        """Of a site; the database's, if it has one country only."""
        return self.sites[site].country or (self.countries[0] if len(self.countries) == 1 else None)

    def lod_brain_rows_of(self, site: str) -> list[str]:
        """Ids of LOD-Brain's rows that a site stands in."""
        return [row for row, content in self.lod_brain.items() if content.sites is None or site in content.sites]


def _some(names: dict) -> str:
    return ", ".join(list(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


_PARTS = {"site_rule": SiteRule, "redistribute": Redistribution, "labels": LabelSource, "age_years": Ages, "sexes": Sexes}
_UNDER_A_NAME = {"sites": Site, "lod_brain": LodBrainRow}


def fault(error: dict) -> str:
    """One of pydantic's errors as ``field: what came; what was wanted``."""
    path = [part for part in error["loc"] if part != "[key]"]
    where = ".".join(map(str, path)) or "the file"
    if not path and error["type"] == "value_error":  # of fields that do not fit together, which it names
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{where}: nothing came; a value is wanted"
    if error["type"] == "extra_forbidden":
        above = path[:-1]
        model = _UNDER_A_NAME[above[0]] if len(above) == 2 and above[0] in _UNDER_A_NAME else _PARTS.get(above[-1] if above else "", Database)
        return f"{where}: an unknown field came ({error['input']!r:.60}); one of {', '.join(model.model_fields)} is wanted"
    if error["type"] == "model_type":
        return f"{where}: {error['input']!r:.80} came; fields and their values are wanted"
    wanted = re.sub(r"^(Input|String|List|Dictionary) should (be )?|^Value error, ", "", error["msg"])
    return f"{where}: {error['input']!r:.80} came; {wanted}{'' if 'wanted' in wanted else ' is wanted'}"
