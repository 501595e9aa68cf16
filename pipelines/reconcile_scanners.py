"""Maker, model and field strength: the sidecar's value where it is clear, else the catalogue's; and whether the sidecars of one site agree."""

from collections import defaultdict
from collections.abc import Mapping

from data_registry.catalogue_schema import Site
from data_registry.readings import MANUFACTURERS, Reading, canonical_manufacturer, is_empty, letters_of, letters_of_model, read_field_strength
from pipelines.notes import Notes

MM = 0.05
"""Voxel edges may differ by this much."""
KEYS = {"manufacturer": "Manufacturer", "model": "ManufacturersModelName", "field_strength_tesla": "MagneticFieldStrength"}
PARTING = ("InstitutionName", "DeviceSerialNumber")
"""Fields of a sidecar that have one value where there is one institution with one machine."""


def merged(sidecars: Mapping[str, dict]) -> dict:
    """The fields of several sidecars together; a later sidecar overrides an earlier one.

    >>> merged({"T1w.json": {"Manufacturer": "GE", "EchoTime": 3}, "sub-01/anat/sub-01_T1w.json": {"Manufacturer": "Philips"}})
    {'Manufacturer': 'Philips', 'EchoTime': 3}
    """
    return {key: value for content in sidecars.values() for key, value in content.items()}


class Scanners:
    """One database's scanners; conflicts go to ``notes``."""

    def __init__(self, notes: Notes) -> None:
        self.notes, self.database = notes, notes.database
        self._seen: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        """Site and field → value → scans."""
        self._told: dict[str, str] = {}
        """Scan → the sidecar nearest to it."""

    def facts(self, row: dict, sidecars: dict[str, dict]) -> dict:
        """``manufacturer``, ``model`` and ``field_strength_tesla`` of a scan; the nearest of its ``sidecars``, the last, counts most."""
        site, sidecar = self.database.sites.get(row["site"]), merged(sidecars)
        about = {"site": row["site"], "scan": row["scan_id"], "subject": row["subject"], "file": next(reversed(sidecars), row["t1w_path"])}
        values, self._told[row["scan_id"]] = {}, about["file"]
        for field, key in KEYS.items():
            written, expected = sidecar.get(key), getattr(site, field, None)
            reading = _read(field, written, expected)
            if reading.kind:
                self.notes.add(reading.kind, field, found=written, done=reading.done, together=True, **about)
            self._check_inherited(field, written, sidecars, about)
            values[field] = self._prefer(field, reading.value, expected, written, about)
            if reading.value is not None:
                self._seen[row["site"], field][f"{reading.value:g}" if isinstance(reading.value, float) else reading.value].append(row["scan_id"])
        for key in PARTING:
            if not is_empty(sidecar.get(key)):
                self._seen[row["site"], key][" ".join(str(sidecar[key]).split())].append(row["scan_id"])
        self._check_voxel(sidecar, site, about)
        return values

    def _prefer(self, field: str, told: object, expected: object, written: object, about: dict) -> object:
        if told is None:
            kind, done = ("missing value", "null") if expected is None else ("from the catalogue", "the catalogue's is taken")
            self.notes.add(kind, field, expected=expected, found=written, done=done, together=True, **about)
            return expected
        if expected is not None and told != expected:
            self.notes.add("sidecar against catalogue", field, expected=expected, found=told, done="the sidecar's is taken", **about)
        return told

    def _check_inherited(self, field: str, written: object, sidecars: dict[str, dict], about: dict) -> None:
        """Note a sidecar that contradicts a nearer one of the scan; by BIDS's inheritance the nearer one counts."""
        for name, content in sidecars.items():
            value = content.get(KEYS[field])
            if value not in (None, written):
                done = "the nearer sidecar's is read"
                self.notes.add("contradicting sidecars", field, expected=f"{value} in {name}", found=written, done=done, **about)

    def _check_voxel(self, sidecar: dict, site: Site | None, about: dict) -> None:
        for key in ("SpacingBetweenSlices", "SliceThickness"):
            edge, expected = sidecar.get(key), getattr(site, "voxel_mm", None)
            if isinstance(edge, int | float) and edge > 0:
                if expected and abs(edge - expected[2]) > MM:
                    told = {"expected": f"{expected[2]:g} between slices", "found": f"{key} {edge:g}"}
                    self.notes.add("sidecar against catalogue", "voxel_mm", done="neither is used; the image says its voxels", **told, **about)
                return

    def finish(self) -> None:
        """Note the sites whose scans come from several scanners or institutions."""
        for (site, field), values in sorted(self._seen.items()):
            kind, done = "contradicting sidecars", "each scan keeps its own"
            if field in PARTING:
                values = _spelled_alike(values)
                way = f"; site_rule: {{sidecar: {field}}} would part them" if self.database.site_rule.single else ", as the site rule says"
                kind, done = "mixed sites", f"all stay site {site}{way}"
            if len(values) > 1:
                most = sorted(values.items(), key=lambda item: (-len(item[1]), item[0]))
                found = ", ".join(f"{value} ({len(scans)})" for value, scans in most[:12]) + (" …" if len(most) > 12 else "")
                others = [scan for _, scans in most[1:] for scan in scans]
                first = {"scan": min(others), "scans": len(others), "file": self._told[min(others)]}
                self.notes.add(kind, field, site=site, expected="one at a site", found=found, done=done, **first)


def _read(field: str, written: object, expected: object) -> Reading:
    """Read a sidecar's field; a model gets the catalogue's spelling."""
    if is_empty(written):
        return Reading(None)
    if field == "field_strength_tesla":
        return read_field_strength(written)
    text = " ".join(str(written).split())
    if field == "model":
        same = isinstance(expected, str) and letters_of_model(expected) == letters_of_model(text)
        return Reading(expected, "spelling", f"{expected} taken, as in the catalogue") if same and text != expected else Reading(text)
    value = canonical_manufacturer(text)
    if value not in MANUFACTURERS:
        return Reading(value, "unknown manufacturer", "taken as it is written")
    return Reading(value) if value == written else Reading(value, "spelling", f"{value} taken")


def _spelled_alike(values: dict[str, list[str]]) -> dict[str, list[str]]:
    """Merge names that differ only in case, accents, blanks and punctuation; the first spelling is kept."""
    first: dict[str, str] = {}
    merged: dict[str, list[str]] = defaultdict(list)
    for name, scans in values.items():
        merged[first.setdefault(letters_of(name), name)] += scans
    return merged
