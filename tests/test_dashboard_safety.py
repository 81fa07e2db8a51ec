"""The dashboard's server from outside: what it refuses, what it never reads, what it says."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from browser import serving
from flask.testing import FlaskClient
from runs import made_run, made_study

from mendel.search.dashboard.app import make_app
from mendel.search.dashboard.guard import is_loopback
from mendel.search.dashboard.serve import Dashboard
from mendel.search.dashboard.watch import Watch, inside
from mendel.search.exports.formats import FORMATS
from mendel.search.run import open_run
from mendel.search.store import RunStore, locked

SECRET = "the secret outside"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    (place / "runs").mkdir()
    made_run(place / "runs", trials=12)
    (place / "runs" / "made.yaml").unlink()
    (place / "secret.txt").write_text(SECRET, encoding="utf-8")
    return place


def _client(runs: Path, **settings: Any) -> tuple[FlaskClient, Watch]:
    watch = Watch(runs)
    watch.poll()
    return make_app(watch, **settings).server.test_client(), watch


@pytest.fixture
def client(place: Path) -> FlaskClient:
    return _client(place / "runs")[0]


@pytest.mark.parametrize(
    "path",
    [
        "/picture?run=../secret.txt&trial=1",
        "/picture?run=%2e%2e%2fsecret.txt&trial=1",
        "/picture?run=made&trial=../../secret.txt",
        "/picture?run=made&preset=../../secret",
        "/export?run=..&trial=1",
        "/export?run=made&trial=1&file=../../../secret.txt",
        "/export?run=made&trial=1&format=../x",
        "/export?run=made&trial=999999999",
        "/export?run=made&trial=99999999999999999999999",
        "/export?run=made%00&trial=1",
        "/assets/../serve.py",
        "/assets/%2e%2e/serve.py",
        "/_dash-component-suites/dash/../../secret.txt",
    ],
)
def test_no_address_reads_what_it_should_not(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (200, 404)
    text = answer.get_data(as_text=True)
    assert SECRET not in text
    assert "Traceback" not in text
    assert "make_server" not in text
    if answer.status_code == 200:
        # Unknown addresses get the page's frame, which then says that there is nothing there.
        assert "<title>Mendel</title>" in text


def test_links_and_pipes_are_not_followed(place: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    good = made_run(runs_of(runs), trials=12)
    (runs / "made.yaml").unlink()
    (runs / "elsewhere").symlink_to(place / "runs" / "made")
    for name, target in (("linked-study", "study.yaml"), ("linked-events", "events.jsonl")):
        (runs / name).mkdir()
        for file in ("study.yaml", "events.jsonl"):
            source = place / "runs" / "made" / file
            if file == target:
                (runs / name / file).symlink_to(source)
            else:
                (runs / name / file).write_bytes(source.read_bytes())
    (runs / "piped").mkdir()
    (runs / "piped" / "study.yaml").write_bytes((good / "study.yaml").read_bytes())
    os.mkfifo(runs / "piped" / "events.jsonl")
    curves = good / "trials" / "00000" / "curves.json"
    curves.unlink()
    curves.symlink_to(place / "runs" / "made" / "trials" / "00000" / "curves.json")
    watch = Watch(runs)
    watch.poll()
    assert set(watch.runs) == {"made", "linked-study", "linked-events", "piped"}
    for name in ("linked-study", "linked-events", "piped"):
        assert watch.runs[name].view is None
        assert "is no file within" in watch.runs[name].problem
    assert watch.curves(watch.runs["made"], 0) == {}
    assert watch.curves(watch.runs["made"], 1) != {}


def runs_of(path: Path) -> Path:
    path.mkdir()
    return path


def test_inside_takes_only_regular_files_below(tmp_path: Path) -> None:
    (tmp_path / "below").write_text("x", encoding="utf-8")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert inside(tmp_path, tmp_path / "below")
    for path in (tmp_path, tmp_path / "none", tmp_path / "round", tmp_path / ".." / "x"):
        assert not inside(tmp_path, path)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8050", "localhost.evil.example"])
def test_other_hosts_are_refused(client: FlaskClient, host: str) -> None:
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == 403
    assert "Mendel" not in answer.get_data(as_text=True)


@pytest.mark.parametrize("host", ["localhost:8050", "127.0.0.1", "[::1]:8050", "LOCALHOST"])
def test_this_machine_is_served(client: FlaskClient, host: str) -> None:
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_other_sites_and_writing_methods_are_refused(client: FlaskClient) -> None:
    assert client.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    for method in ("PUT", "DELETE", "PATCH"):
        assert client.open("/", method=method).status_code == 405


def test_every_format_is_a_download_or_says_why_not(client: FlaskClient) -> None:
    for name in FORMATS:
        answer = client.get(f"/export?run=made&trial=1&format={name}")
        assert (answer.status_code, answer.mimetype) in (
            (200, "application/zip"),
            (404, "text/plain"),
        )
        if answer.status_code == 200:
            files = zipfile.ZipFile(io.BytesIO(answer.data)).namelist()
            assert any(f.endswith("provenance.json") for f in files)
    model = client.get("/export?run=made&trial=1&format=hf")
    names = zipfile.ZipFile(io.BytesIO(model.data)).namelist()
    assert any(n.endswith("modeling_mendel.py") for n in names)


def test_beyond_the_loopback_a_token_is_needed(place: Path) -> None:
    client, _ = _client(place / "runs", hosts=["box"], token="s3cret-token", wide=True)
    inside_host = {"Host": "192.168.1.5:8050"}
    for path in (
        "/",
        "/?token=wrong",
        "/_dash-layout",
        "/export?run=made&trial=1",
        "/assets/page.js",
    ):
        assert client.get(path, headers=inside_host).status_code == 403
    answer = client.get("/?token=s3cret-token", headers=inside_host)
    assert answer.status_code == 303
    assert answer.headers["Location"] == "/"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    held = {**inside_host, "Cookie": cookie.partition(";")[0]}
    assert client.get("/_dash-layout", headers=held).status_code == 200
    assert client.get("/", headers={**held, "Host": "evil.example"}).status_code == 403


def test_which_addresses_are_this_machine() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.1.5", "::", "example.org")))


def test_the_printed_address_carries_the_token(place: Path) -> None:
    served = Dashboard(place / "runs", host="0.0.0.0", port=0)
    try:
        assert served.token is not None
        assert len(served.token) >= 32
        assert served.address.endswith(f"?token={served.token}")
    finally:
        served._server.server_close()
    with serving(place / "runs") as local:
        assert local.token is None
        assert local.address == f"http://127.0.0.1:{local.port}/"


def test_looking_writes_nothing_and_holds_no_lock(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    folder = made_run(tmp_path, trials=12)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    client, watch = _client(tmp_path)
    for path in ("/picture?run=made&trial=3", "/export?run=made&trial=3"):
        assert client.get(path).status_code == 200
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with RunStore.open(study):
        assert locked(folder)
        watch._polled = float("-inf")
        watch.poll()
        assert watch.runs["made"].state == "running"


def test_reading_goes_on_from_where_it_stopped(tmp_path: Path, monkeypatch: Any) -> None:
    folder = made_run(tmp_path, trials=12)
    whole = (folder / "events.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"".join(lines[:20]))
    run = open_run(folder)
    taken: list[Any] = []
    apply = run._apply
    monkeypatch.setattr(run, "_apply", lambda event: (taken.append(event), apply(event)))
    assert not run.refresh()
    with (folder / "events.jsonl").open("ab") as handle:
        handle.write(b"".join(lines[20:])[:-5])
    assert run.refresh()
    with (folder / "events.jsonl").open("ab") as handle:
        handle.write(whole[-5:])
    assert run.refresh()
    assert len(taken) == len(lines) - 20
    assert run.trials == open_run(folder).trials


def test_a_journal_that_was_cut_or_replaced_is_read_anew(tmp_path: Path) -> None:
    folder = made_run(tmp_path, trials=12)
    path = folder / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    run = open_run(folder)
    path.write_bytes(b"".join(lines[:30]))
    assert run.refresh()
    assert len(run.trials) < 17
    other = folder / "other"
    other.write_bytes(b"".join(lines))
    other.replace(path)
    assert run.refresh()
    assert run.trials == open_run(folder).trials
    assert run.damaged == 0
