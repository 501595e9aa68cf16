"""Fetching from a real S3 server and from HTTP on loopback: cut midway, changed meanwhile, damaged; then the same command goes on."""

import hashlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from loopback_http import CuttingProxy, folder_server
from loopback_s3 import BUCKET, s3_server
from small_route import NAME, NETWORK, T1W, UNWANTED, WANTED, database, get, known, ledger, manifest, scan, there, write

from data_registry.catalogue_schema import Site
from data_registry.errors import InputError
from data_registry.label_sources import find_labels
from pipelines import fetch as fetching
from pipelines import fetch_terms, fetch_transfer
from pipelines.fetch import Choice, Network, fetch
from pipelines.fetch_choice import find_files, find_parts
from pipelines.fetch_routes import Changed
from pipelines.fetch_sources import open_route
from pipelines.index import index

CHECKOUT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("route_project")


# From a bucket


@pytest.fixture(scope="module")
def server():
    with s3_server() as environment:
        yield environment


@pytest.fixture
def bucket(server, request, monkeypatch):
    """(client, prefix, proxy) of a bucket that holds the database; without credentials in the environment."""
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=server["AWS_ENDPOINT_URL"], **keys)
    for path, content in (WANTED | UNWANTED).items():
        client.put_object(Bucket=BUCKET, Key=f"{request.node.name}/{path}", Body=content, ACL="public-read")
    client.put_object(Bucket=BUCKET, Key=f"{request.node.name}/sub-01/", Body=b"")  # as consoles make a folder
    proxy = CuttingProxy(int(server["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    return client, request.node.name, proxy


def test_a_bucket_gives_what_is_wanted_and_nothing_else_once(bucket, capsys):
    client, prefix, proxy = bucket
    route = f"s3://{BUCKET}/{prefix}"
    assert get(route) == {} and there() == WANTED
    assert "next: `index: {roots: [data/small]}`" in capsys.readouterr().out
    rows = ledger()
    assert rows.keys() == WANTED.keys()
    assert rows[T1W]["sha256"] == hashlib.sha256(WANTED[T1W]).hexdigest() and rows[T1W]["version"] == hashlib.md5(WANTED[T1W]).hexdigest()
    before, proxy.passed = Path("data/small/fetched.tsv").read_bytes(), 0
    assert get(route) == {} and Path("data/small/fetched.tsv").read_bytes() == before
    assert proxy.passed < 30_000  # listings alone

    client.put_object(Bucket=BUCKET, Key=f"{prefix}/{T1W}", Body=(newer := scan(11)), ACL="public-read")
    os.truncate(Path("data/small/README"), 3)
    assert get(route) == {} and there() == WANTED | {T1W: newer}
    assert len(Path("data/small/fetched.tsv").read_text().splitlines()) == len(WANTED) + 3

    found = [set(find_labels(Path("data/small"), *scan)) for scan in (("01", ""), ("02", ""), ("03", "1"))]
    assert found == [{"aparc_aseg"}, {"hand_a"}, {"aseg"}]


def test_a_cut_connection_is_one_line_and_the_same_command_goes_on(bucket):
    _, prefix, proxy = bucket
    proxy.budget = 1_000_000
    with pytest.raises(InputError, match=rf"^s3://{BUCKET}/{prefix}: .* of {len(WANTED)} files came and are kept, the same command"):
        get(f"s3://{BUCKET}/{prefix}", network=Network(workers=1, tries=1))
    parts = sum(path.stat().st_size for path in Path("data/small/.fetching").glob("*.part"))
    done = {path: content for path, content in there().items() if not path.startswith(".fetching")}
    assert parts > 200_000 and done.items() < WANTED.items()
    proxy.budget, proxy.passed = float("inf"), 0
    assert get(f"s3://{BUCKET}/{prefix}") == {} and there() == WANTED
    left = sum(map(len, WANTED.values())) - sum(map(len, done.values())) - parts
    assert left < proxy.passed < left + 150_000  # what was there did not come again


def test_an_object_replaced_meanwhile_is_not_taken_for_the_one_that_was_listed(bucket):
    client, prefix, proxy = bucket
    route = open_route(f"s3://{BUCKET}/{prefix}")
    with ThreadPoolExecutor(2) as pool:
        parts = find_parts(route, database(), pool)
        files = {file.path: file for file in find_files(route, parts, [["01"]], pool, labels=False)}
    assert parts[0].subjects == ["01", "02", "03"]
    assert b"".join(route.read(files[T1W].entry, 100_000)) == WANTED[T1W][100_000:]
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/{T1W}", Body=scan(12, 900_000), ACL="public-read")
    with pytest.raises(Changed):
        b"".join(route.read(files[T1W].entry, 100_000))


def test_part_of_a_version_is_no_beginning_of_another(bucket):
    client, prefix, proxy = bucket
    proxy.budget = 400_000
    with pytest.raises(InputError):
        get(f"s3://{BUCKET}/{prefix}", choice=Choice(subjects=["sub-01"], labels=False), network=Network(workers=1, tries=1))
    assert any(Path("data/small/.fetching").glob("*.part")) and not Path("data/small", T1W).exists()
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/{T1W}", Body=(newer := scan(13, 900_000)), ACL="public-read")
    proxy.budget = float("inf")
    assert get(f"s3://{BUCKET}/{prefix}", choice=Choice(subjects=["sub-01"], labels=False)) == {}
    assert there()[T1W] == newer and not Path("data/small/.fetching").exists()


def test_several_databases_of_openneuro_become_one(bucket, monkeypatch, caplog):
    """As AOMIC's: the same labels mean different people, and no table has a column of sites."""
    client, prefix, proxy = bucket
    for number, name in ((1, "ds000001"), (2, "ds000002")):
        for path, content in {
            "sub-01/anat/sub-01_T1w.nii.gz": scan(number), "derivatives/freesurfer/sub-01/mri/aseg.mgz": scan(number + 2), "T1w.json": b"{}",
            "participants.tsv": f"participant_id\tage\nsub-01\t{number}0\n".encode(),
        }.items():  # fmt: skip
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}/{path}", Body=content, ACL="public-read")
    known(monkeypatch, sites={"One": Site(place="p", folders=["ds000001"]), "Two": Site(place="p", folders=["ds000002"])})
    route = f"s3://{BUCKET}/{prefix}/ds000001 s3://{BUCKET}/{prefix}/ds000002"
    proxy.budget = 150_000
    with pytest.raises(InputError, match="the same command goes on"):
        get(route, network=Network(workers=1, tries=1))
    proxy.budget = float("inf")
    assert get(route) == {} and get(route, verify=True) == {}
    rows = [(row["subject"], row["site"], row["age_years"], [one["source"] for one in row["labels"]]) for row in index([Path("data/small")])]
    assert rows == [("ds000001x01", "One", 10, ["aseg"]), ("ds000002x01", "Two", 20, ["aseg"])]
    assert there()["sub-ds000002x01/anat/sub-ds000002x01_T1w.nii.gz"] == scan(2)
    fetch_terms.WITHDRAWN.write_text("database\tsubject\tdate\treason\nsmall\tds000002x01\t\t\n")
    get(route)
    assert there()["sourcedata/ds000001/participants.tsv"].endswith(b"sub-01\t10\n")
    assert there()["sourcedata/ds000002/participants.tsv"] == b"participant_id\tage\n" and b"ds000002" not in there()["participants.tsv"]
    caplog.clear()
    shutil.rmtree("data")
    get(route.split()[0])
    assert "participants.tsv has no column 'site', from which small takes sites; index will want it" in caplog.text


def test_a_bucket_that_is_not_there_is_one_line(bucket):
    with pytest.raises(InputError, match="^s3://nowhere/x: no sub-\\* in it, nothing can be listed there"):
        get("s3://nowhere/x")


# Over HTTP


@pytest.mark.parametrize("ranges", [True, False])
def test_http_goes_on_after_a_cut(mirror, ranges):
    manifest(mirror)
    with folder_server(mirror) as web:
        web.ranges, web.cuts, web.cut_after = ranges, 2, 300_000
        assert get(web.url, network=Network(workers=2, tries=2)) == {} and there() == WANTED
        again = 0 if ranges else 2 * 300_000
        assert web.sent[T1W] == len(WANTED[T1W]) + again
        web.cuts, web.cut_after = 1000, 100_000
        os.remove(Path("data/small", T1W))
        if ranges:
            assert get(web.url) == {}  # nine cuts with one try: each brought some
        else:
            with pytest.raises(InputError, match="the connection ended after 100000 of 900093 bytes; 0 of 1 files came and are kept"):
                get(web.url)


def test_a_folder_that_was_fetched_can_be_fetched_from(mirror):
    get(mirror, to=Path("first", NAME))
    with folder_server(Path("first", NAME)) as web:
        assert get(f"{web.url}/fetched.tsv") == {} and there() == WANTED


def test_what_is_wrong_is_named_and_not_put_in_its_place(mirror, monkeypatch, capsys):
    login = b"<!DOCTYPE html><title>Login</title>"
    pointer = b"/annex/objects/MD5E-s9--d41d8cd98f00b204e9800998ecf8427e.nii.gz\n"
    write(mirror, {"sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz": pointer})
    wrong = "sub-02/anat/sub-02_T1w.nii.gz"
    manifest(mirror, odd=f"sub-04/anat/sub-04_T1w.nii.gz\t9\t{'0' * 64}", **{"sub-02_T1w": "0" * 64})
    with folder_server(mirror) as web:
        web.pages[T1W] = login
        monkeypatch.setattr(sys, "argv", ["fetch", NAME, "--route", web.url, "--accept-licence", "CC0", "--tries", "2"])
        with pytest.raises(SystemExit) as ended:
            fetching.main()
        assert ended.value.code == 1 and web.sent[wrong] == 3 * len(WANTED[wrong])
    out, said = capsys.readouterr()
    assert "next:" not in out and "error: 4 files could not be had; the same command tries them again" in said
    assert f"error: {T1W}: {len(login)} bytes are offered, an HTML page; {len(WANTED[T1W])} are wanted" in said
    assert f"error: {wrong}: SHA-256 {hashlib.sha256(WANTED[wrong]).hexdigest()} came; {'0' * 64} is wanted" in said
    assert "error: sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz: git-annex's pointer instead of the file" in said
    assert "error: sub-04/anat/sub-04_T1w.nii.gz: the server answers 404 Not Found\nerror: 4 files could not be had" in said
    failed = {T1W, wrong, "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz"}
    assert ledger().keys() == {path for path in there() if not path.startswith(".fetching")} == WANTED.keys() - failed


@pytest.mark.parametrize(("line", "why"), [
    (f"../sub-01/anat/x_T1w.nii.gz\t9\t{'0' * 64}", "leads out of its folder"),
    (f"/etc/passwd\t9\t{'0' * 64}", "leads out of its folder"),
    (f"sub-01/../../x\t9\t{'0' * 64}", "leads out of its folder"),
    (f"sub-01/anat/sub-01_T1w.nii.gz\t-9\t{'0' * 64}", "a whole number of bytes"),
    ("sub-01/anat/sub-01_T1w.nii.gz\t9\tn/a", "a checksum in hexadecimal"),
])  # fmt: skip
def test_a_manifest_that_cannot_be_trusted_is_refused_whole(mirror, line, why):
    manifest(mirror, odd=line)
    with folder_server(mirror) as web, pytest.raises(InputError, match=f"manifest.tsv, line {len(WANTED | UNWANTED) + 2}: .*{why}"):
        get(web.url)
    assert not Path("data").exists()


def test_an_address_without_a_manifest_is_refused(mirror):
    with folder_server(mirror) as web, pytest.raises(InputError, match="manifest.tsv: the server answers 404 Not Found; HTTP has no listing"):
        get(web.url)


def test_a_server_that_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match=f"^http://{host}/manifest.tsv: timed out; HTTP has no listing"):
            get(f"http://{host}", network=Network(tries=0, timeout_s=0.1))
        with pytest.raises(InputError, match="^s3://b/x: Read timeout.*; a route that can be listed is wanted$"):
            get("s3://b/x", network=Network(f"http://{host}", tries=1, timeout_s=0.1))


# From a folder


def test_a_link_of_git_annex_without_its_content_is_named(mirror):
    (mirror / T1W).unlink()
    (mirror / T1W).symlink_to("../../.git/annex/objects/aa/bb/MD5E-s9--d4.nii.gz/MD5E-s9--d4.nii.gz")
    assert get(mirror) == {T1W: "a git-annex link without its content; `datalad get` there is wanted"}


def test_a_dry_run_counts_and_writes_nothing(mirror, capsys):
    fetch(NAME, route=str(mirror), dry_run=True)  # no licence is wanted to look
    total = f"{len(WANTED)} files, {sum(map(len, WANTED.values())) / 1e9:.3f} GB"
    assert capsys.readouterr().out == f"small: {total} at {mirror}; 0 are here, {total} to fetch\n"
    assert not any(Path().iterdir())


def test_what_is_here_by_other_means_is_told_by_its_checksum(mirror):
    manifest(mirror)
    write(Path("data", NAME), {T1W: WANTED[T1W], "sub-02/anat/sub-02_T1w.nii.gz": scan(16)})
    with folder_server(mirror) as web:
        assert get(web.url) == {} and there() == WANTED and T1W not in web.sent


def test_verify_finds_what_has_been_damaged_here(mirror):
    get(mirror)
    damaged = bytearray(WANTED[T1W])
    damaged[500] ^= 1
    Path("data", NAME, T1W).write_bytes(damaged)
    assert get(mirror) == {} and there()[T1W] == damaged
    assert get(mirror, verify=True) == {} and there() == WANTED


def test_two_databases_do_not_mix_in_one_folder(mirror, tmp_path):
    get(mirror)
    other = write(tmp_path / "other", {T1W: scan(17)})
    with pytest.raises(InputError, match=f"{T1W}: .* two databases; another --to is wanted"):
        get(other)
    with pytest.raises(InputError, match="--to elsewhere: the folder's name becomes the database's"):
        get(mirror, to=Path("elsewhere"))


def test_a_disk_without_room(mirror, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(InputError, match="data/small: 0.00 GB are free; 0.00 GB are wanted"):
            get(mirror)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))  # a file cannot grow beyond, as on a disk that fills up midway
    try:
        with pytest.raises(OSError) as ended:
            get(mirror)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.value.filename == f"data/small/{T1W}" and not Path("data/small", T1W).exists()
    assert get(mirror) == {} and there() == WANTED


def test_a_run_that_fails_leaves_no_worker_behind(mirror, monkeypatch):
    bring, threads = fetch_transfer._Fetching._bring, threading.active_count()

    def full(self, file, part):
        if file.path == T1W:
            raise OSError(28, "No space left on device")
        time.sleep(0.2)
        bring(self, file, part)

    with monkeypatch.context() as patch:
        patch.setattr(fetch_transfer._Fetching, "_bring", full)
        with pytest.raises(OSError, match="No space left"):
            get(mirror)
    assert threading.active_count() == threads
    assert get(mirror) == {} and there() == WANTED


def test_ctrl_c_leaves_nothing_half_written(mirror, route_project):
    manifest(mirror)
    with folder_server(mirror) as web:
        web.wait_s = 0.2
        command = [sys.executable, "-m", "pipelines.fetch", "ibsr2", "--route", web.url, "--accept-licence", "unknown", "--workers=1", "--no-labels"]
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
        run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while not web.sent.get(T1W):
            assert run.poll() is None
            time.sleep(0.01)
        with pytest.raises(InputError, match="another fetch is at work there"):
            fetch("ibsr2", route=web.url, network=NETWORK)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=10)[1]
        assert run.returncode == 130 and "run the same command again to go on" in said and "Traceback" not in said
        done = {path for path in there(Path("data/ibsr2")) if not path.startswith(".fetching")}
        assert done < set(WANTED) and T1W not in done
        web.wait_s = 0
        assert fetch("ibsr2", route=web.url, network=NETWORK) == {} and there(Path("data/ibsr2")) == WANTED
