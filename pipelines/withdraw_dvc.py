"""Where DVC keeps shards of a withdrawn person or database, in its cache and its remotes, and what purges them. Nothing here changes anything."""

import configparser
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from data_registry.ledgers import Withdrawn
from data_registry.shards import read_metadata


def in_dvc(database: str, these: Withdrawn) -> Iterator[str]:
    """Lines for the shards that DVC's lists of folders name, of whatever version, and for the command that removes all that is not in use."""
    home = next((folder / ".dvc" for folder in (Path().absolute(), *Path().absolute().parents) if (folder / ".dvc").is_dir()), None)
    if home is None:
        return
    cache, remotes = _dvc_places(home)
    objects = sorted(_objects(cache, database, these)) if cache.is_dir() else []
    where = {"the cache": (str(cache), None), **{f"remote {name}": place for name, place in remotes.items()}}
    for name, (url, endpoint) in where.items():
        for md5 in objects:
            path = f"{url}/files/md5/{md5[:2]}/{md5[2:]}"
            if "://" not in url:
                if Path(path).exists():
                    yield f"{name}: rm -f {shlex.quote(path)}"
            elif url.startswith("s3://"):
                yield f"{name}: aws s3 rm {shlex.quote(path)}{f' --endpoint-url {endpoint}' if endpoint else ''}"
            else:
                yield f"{name}: delete {path}"
    yield "tables, reports, pictures, checkpoints and shards that were listed nowhere, once `dvc repro` has run: dvc gc --workspace --force"
    for name in remotes:
        yield f"  and in {name}: dvc gc --workspace --cloud --remote {shlex.quote(name)} --force (with versions kept there: delete those too)"
    yield f"  both keep this workspace's alone; where others share {cache} or a remote, add --projects with the folder of each"


def _dvc_places(home: Path) -> tuple[Path, dict[str, tuple[str, str | None]]]:
    """The cache's folder, and each remote's URL or folder with its server's, from DVC's own settings, the more local ones before the others."""
    cache, remotes = home / "cache", {}
    user = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "dvc"
    for path in (Path("/etc/xdg/dvc/config"), user / "config", home / "config", home / "config.local"):
        settings = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            settings.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue
        for name in settings.sections():
            if name == "cache" and "dir" in settings[name]:
                cache = Path(os.path.normpath(path.parent / settings[name]["dir"]))
            elif (match := re.fullmatch(r"""'?remote ["'](.+?)["']'?""", name)) and "url" in settings[name]:
                url = settings[name]["url"].rstrip("/")
                remotes[match[1]] = url if "://" in url else os.path.normpath(path.parent / url), settings[name].get("endpointurl")
    return cache, remotes


def _objects(cache: Path, database: str, these: Withdrawn) -> set[str]:
    """MD5 of every object that is, or may be, a shard with them in it."""
    site = re.compile(rf"(.*/)?grid=[^/]+/site={re.escape(database)}\.[^/]+/[^/]+\.parquet")
    found = set()
    for listing in cache.glob("files/md5/??/*.dir"):
        try:
            entries = [entry["md5"] for entry in json.loads(listing.read_text(encoding="utf-8")) if site.fullmatch(entry["relpath"])]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for md5 in entries:
            notes = read_metadata(cache / "files/md5" / md5[:2] / md5[2:])
            if notes is None or any(these.has_scan(row["scan_id"]) for row in notes.get("samples", ())):
                found.add(md5)
    return found
