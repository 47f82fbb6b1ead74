"""Downloads: whole through every fault of a network, or a line that says what to do. The hub is on this machine."""

import email.utils
import errno
import os
import subprocess
import threading
import time
from pathlib import Path

import hub as faulty
import pytest
import requests
from hub import Hub, fresh_login, leftovers, listing, parquet, refusal, serving, texts

from harness import downloads
from harness.downloads import download, download_all

ROOT = Path(downloads.__file__).parent


@pytest.fixture(autouse=True)
def a_fresh_login(tmp_path_factory, monkeypatch):
    fresh_login(monkeypatch, tmp_path_factory.mktemp("home"))


@pytest.fixture
def hub(cache, a_fresh_login, monkeypatch):
    """A hub that HF_ENDPOINT names, and no waiting between tries."""
    monkeypatch.setattr(downloads, "BACK_OFF", 0.0)
    hub = Hub()
    with serving(hub) as hub.address:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


# --- one file ------------------------------------------------------------------------------------

SHARD = "/shard.parquet"
OLD, NEW = (parquet(20 * part) for part in (texts(0, 600), [t.upper() for t in texts(0, 600)]))  # of one length

FAULTS = {
    "server errors": [500, 502, 503],
    "too many requests": [faulty.busy(0)],
    "connection reset": [faulty.reset, faulty.reset],
    "reset midway": [faulty.reset_midway],
    "cut short": [faulty.cut],
    "cut short again and again": [faulty.cut, faulty.cut, faulty.cut],
    "length too large": [faulty.claims_more],
    "length too small": [faulty.claims_less],
    "no length, cut short": [faulty.no_length_cut],
    "range ignored": [faulty.cut, faulty.range_ignored],
    "another range than asked for": [faulty.cut, faulty.wrong_range],
    "range refused": [faulty.cut, 416],
    "range refused by a page": [faulty.cut, faulty.no_such_range],
    "more than announced": [faulty.cut, faulty.too_long],
    "silence": [faulty.stall(1.5)],
    "silence from the start": [faulty.no_answer(1.5)],
    "compressed on the way": [faulty.compressed],
    "all of it together": [503, faulty.cut, faulty.reset, faulty.busy(0), faulty.claims_less, faulty.no_length_cut],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_a_download_comes_whole_through_any_fault(hub, tmp_path, monkeypatch, faults):
    monkeypatch.setattr(downloads, "TIMEOUT", (10, 0.5))
    hub.files[SHARD], hub.faults[SHARD] = OLD, list(faults)
    path = tmp_path / "shards" / "shard.parquet"
    download(hub.address + SHARD, path, lambda n: path.exists() and pytest.fail("there before it is whole"))
    assert path.read_bytes() == OLD
    assert not hub.faults[SHARD]  # all of them were met
    assert not leftovers(tmp_path)


def test_a_broken_transfer_goes_on_where_it_stopped(hub, tmp_path):
    hub.files[SHARD], hub.faults[SHARD] = OLD, [faulty.cut]
    download(hub.address + SHARD, tmp_path / "shard.parquet")
    (first, _), (second, status) = hub.requests(SHARD)
    assert "Range" not in first
    start = int(second["Range"].removeprefix("bytes=").removesuffix("-"))
    assert (len(OLD) // 3 - start) < downloads.PIECE < start
    assert second["If-Range"]  # of the same file alone
    assert status == 206


@pytest.mark.parametrize("obeys", [True, False], ids=["server knows If-Range", "server ignores If-Range"])
def test_a_file_that_changes_midway_is_never_mixed(hub, tmp_path, obeys):
    assert len(OLD) == len(NEW)
    hub.files[SHARD], hub.faults[SHARD] = OLD, [faulty.cut, faulty.other_file(NEW, obeys)]
    download(hub.address + SHARD, tmp_path / "shard.parquet")
    assert (tmp_path / "shard.parquet").read_bytes() == NEW


class Waits(list):
    """Takes the place of the event that stops a download: notes how long was to be waited, and waits not."""

    def wait(self, seconds):
        self.append(seconds)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(500, "status 500"), (faulty.reset, "Connection"), (faulty.claims_less, "no whole parquet"),
     (faulty.claims_more, "IncompleteRead"), (416, "status 416"), (faulty.web_page, "no whole parquet")],
)  # fmt: skip
def test_what_never_gets_better_is_given_up_and_leaves_nothing(hub, tmp_path, fault, words):
    hub.files[SHARD], hub.faults[SHARD], waits = OLD, [fault] * 100, Waits()
    line = refusal(download, hub.address + SHARD, tmp_path / "shard.parquet", print, waits)
    assert f"given up after {downloads.ATTEMPTS} attempts" in line and words in line and SHARD in line
    assert len(hub.seen) == downloads.ATTEMPTS == len(waits) + 1  # one count for whatever fails
    assert list(tmp_path.iterdir()) == []


def test_the_waits_between_attempts_grow_to_a_limit_and_a_busy_server_is_heard(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "BACK_OFF", 1.0)
    dates = [email.utils.formatdate(time.time() + seconds, usegmt=True) for seconds in (100, -100)]
    odd = [faulty.busy(text) for text in ("soon", "-5", "\u00b2", "Thu, 99 Foo 2030 00:00:00 GMT")]
    hub.files[SHARD], url = OLD, hub.address + SHARD
    for faults, wanted in (
        ([500, 500, 500, faulty.busy(90), faulty.busy(10**6)], [1, 2, 4, 90, downloads.LONGEST_WAIT]),
        ([faulty.busy(date) for date in dates], [100, 2]),
        (odd, [1, 2, 4, 8]),
    ):
        hub.faults[SHARD], waits = faults, Waits()
        download(url, tmp_path / f"{len(hub.seen)}.parquet", stop=waits)
        assert waits == pytest.approx(wanted, abs=20 if wanted[0] == 100 else 0)
    monkeypatch.setattr(downloads, "ATTEMPTS", 20)
    hub.faults[SHARD], waits = [500, faulty.reset] * 50, Waits()
    refusal(download, url, tmp_path / "shard.parquet", print, waits)
    assert max(waits) == downloads.LONGEST_WAIT
    assert "status 429 from 127.0.0.1; next attempt in 90 s" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "word"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "not found")])
def test_a_refusal_by_the_hub_ends_at_once(hub, tmp_path, status, word):
    hub.faults[SHARD] = [status] * 9
    line = refusal(download, hub.address + SHARD, tmp_path / "shard.parquet")
    assert word in line and str(status) in line and SHARD in line
    assert len(hub.seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_signed_address_that_has_run_out_is_asked_for_anew(hub, elsewhere, tmp_path):
    """The hub sends to a store by an address that holds for a while; what refuses it says nothing of a token."""
    hub.faults[SHARD], elsewhere.faults[SHARD] = [faulty.to(elsewhere.address)] * 2, [403]
    download(hub.address + SHARD, tmp_path / "shard.parquet")
    assert (tmp_path / "shard.parquet").read_bytes() == OLD and len(hub.seen) == 2
    hub.faults[SHARD], elsewhere.faults[SHARD] = [faulty.to(elsewhere.address)] * 99, [403] * 99
    line = refusal(download, hub.address + SHARD, tmp_path / "other.parquet")
    assert "status 403 from localhost" in line and "HF_TOKEN" not in line


@pytest.fixture
def elsewhere():
    """A store on another host, to which a hub sends its visitors."""
    store = Hub()
    store.files = {SHARD: OLD, "/direct.parquet": OLD}
    with serving(store) as address:
        store.address = address.replace("127.0.0.1", "localhost")
        yield store


def test_the_token_goes_to_the_hub_and_to_no_other_host(hub, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    hub.faults[SHARD] = [faulty.to(elsewhere.address)]
    download(hub.address + SHARD, tmp_path / "shard.parquet")
    download(elsewhere.address + "/direct.parquet", tmp_path / "direct.parquet")
    ((asked, status),) = hub.requests(SHARD)
    assert (asked["Authorization"], status) == ("Bearer secret", 302)
    assert len(elsewhere.seen) == 2 and not any("Authorization" in headers for _, headers, _ in elsewhere.seen)
    assert (tmp_path / "shard.parquet").read_bytes() == OLD


@pytest.mark.parametrize("token", ["secret", None])
def test_a_netrc_is_sent_nowhere_and_takes_no_token_s_place(hub, elsewhere, tmp_path, monkeypatch, token):
    (tmp_path / "netrc").write_text("default login somebody password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.files |= {SHARD: OLD, "/moved/shard.parquet": OLD}
    hub.faults |= {"/a.parquet": [faulty.to(hub.address + "/b")], "/c.parquet": [faulty.to(elsewhere.address)]}
    hub.files["/b/a.parquet"] = elsewhere.files["/c.parquet"] = OLD
    for name in (SHARD, "/a.parquet", "/c.parquet"):
        download(hub.address + name, tmp_path / name[1:])
    assert {headers.get("Authorization") for _, headers, _ in hub.seen} == {token and "Bearer secret"}
    assert len(hub.seen) == 4 and ["Authorization" in headers for _, headers, _ in elsewhere.seen] == [False]


TOKEN_FILES = {
    "HF_TOKEN_PATH": {"HF_TOKEN_PATH": "{}/here", "HF_HOME": "{}/nowhere"},
    "HF_HOME": {"HF_HOME": "{}", "XDG_CACHE_HOME": "{}/nowhere"},
    "XDG_CACHE_HOME": {"XDG_CACHE_HOME": "{}/cache"},
    "the home": {"HOME": "{}"},
    "a tilde": {"HOME": "{}", "HF_TOKEN_PATH": "~/here", "HF_TOKEN": " "},
}


@pytest.mark.parametrize("names", TOKEN_FILES.values(), ids=TOKEN_FILES.keys())
def test_the_stored_token_of_a_login_is_used(hub, tmp_path, monkeypatch, names):
    for place in ("here", "token", "cache/huggingface/token", ".cache/huggingface/token"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("stored\n")
    for name, value in names.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    hub.files[SHARD] = OLD
    download(hub.address + SHARD, tmp_path / "first.parquet")
    monkeypatch.setenv("HF_TOKEN", "given")  # goes before it
    download(hub.address + SHARD, tmp_path / "second.parquet")
    assert [headers["Authorization"] for _, headers, _ in hub.seen] == ["Bearer stored", "Bearer given"]


def test_a_token_that_is_refused_is_named_by_its_place(hub, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("old")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    hub.faults[SHARD] = [401]
    assert f"the token in {tmp_path / 'token'}" in refusal(download, hub.address + SHARD, tmp_path / "a" / "b.parquet")
    hub.faults[SHARD] = [401]
    (tmp_path / "token").unlink()
    assert "no token was sent" in refusal(download, hub.address + SHARD, tmp_path / "a" / "b.parquet")


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "tökén"])
def test_a_token_that_none_is_does_not_blame_the_address(hub, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(download, hub.address + SHARD, tmp_path / "shard.parquet")
    assert "the token in HF_TOKEN" in line and token.split()[0] not in line
    assert not hub.seen


def at_once(hub_url, path):
    """The line that a download ends with, without another attempt."""
    waits = Waits()
    line = refusal(download, hub_url, path, print, waits)
    assert not waits
    return line


@pytest.mark.parametrize("endpoint", ["mirror.example", "http://", "ftp://mirror.example", "https://[::1"])
def test_an_address_that_is_none_is_said_at_once(cache, tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT" in at_once(downloads.hub_endpoint() + SHARD, tmp_path / "shard.parquet")


@pytest.mark.parametrize("value", ["1", "true", "YES", "On"])
def test_offline_is_said_at_once_and_nobody_is_asked(hub, tmp_path, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    hub.files[SHARD] = OLD
    line = at_once(hub.address + SHARD, tmp_path / "shard.parquet")
    assert "unset it" in line and SHARD in line
    assert not hub.seen and not list(tmp_path.iterdir())
    (tmp_path / "shard.parquet").write_bytes(OLD)
    download(hub.address + SHARD, tmp_path / "shard.parquet")  # what is here needs no network
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    download(hub.address + SHARD, tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("name", "proxy"),
    [("ALL_PROXY", "socks5h://somebody:password@127.0.0.1:9"), ("HTTP_PROXY", "http://"),
     ("all_proxy", "gopher://127.0.0.1:9")],
)  # fmt: skip
def test_a_proxy_that_cannot_be_used_is_said_at_once(hub, tmp_path, monkeypatch, name, proxy):
    def missing(*_, **__):  # as where the package is
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr("requests.adapters.SOCKSProxyManager", missing)
    monkeypatch.setenv(name, proxy)
    line = at_once(hub.address + SHARD, tmp_path / "shard.parquet")
    assert "all_proxy" in line and "password" not in line


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with a key and its own certificate, which is for another name."""
    path = tmp_path_factory.mktemp("tls") / "other.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=other.example -addext".split()
    words += ["subjectAltName=DNS:other.example", "-keyout", str(path), "-out", str(path.with_suffix(".crt"))]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl that makes certificates")
    with path.open("a") as out:
        out.write(path.with_suffix(".crt").read_text())
    return path


def test_a_certificate_that_does_not_fit_is_said_at_once(hub, certificate, tmp_path, monkeypatch):
    hub.files[SHARD], path = OLD, tmp_path / "shard.parquet"
    with serving(hub, certificate) as address:
        line = at_once(address + SHARD, path)
        assert "self-signed" in line and "REQUESTS_CA_BUNDLE" in line
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert "127.0.0.1" in at_once(address + SHARD, path)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "nowhere.pem"))
        line = at_once(address + SHARD, path)
        assert "nowhere.pem" in line and "AUTORESEARCH_CACHE" not in line
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert "SSL" in at_once(hub.address.replace("http:", "https:") + SHARD, path)
    assert not hub.seen and not list(tmp_path.iterdir())


def test_a_full_disk_is_not_taken_for_the_network_s_fault(hub, tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, "full")

    hub.files[SHARD] = OLD
    with pytest.raises(OSError, match="full"):
        download(hub.address + SHARD, tmp_path / "shard.parquet", full)
    assert len(hub.seen) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file:///etc/hosts", "ftp://mirror.example/a", "http://[oops", SHARD])
def test_a_redirect_that_leads_nowhere_is_said_at_once(hub, tmp_path, place):
    hub.faults[SHARD] = [lambda handler: handler.send(302, b"", Location=place)] * 99
    at_once(hub.address + SHARD, tmp_path / "shard.parquet")
    assert list(tmp_path.iterdir()) == []


def test_what_a_hub_says_cannot_write_to_the_terminal(hub, tmp_path):
    url = f"{hub.address}/api/datasets/some/one/parquet"
    hub.files["/api/datasets/some/one/parquet"] = listing("https://huggingface.co/\x1b[2J.parquet")
    assert url in refusal(downloads.hub_listing, "some/one")


# --- many files ----------------------------------------------------------------------------------


def test_one_failure_stops_the_other_downloads_and_whole_files_stay(hub, tmp_path):
    told = threading.Event()

    def endless(handler):
        handler.send(200, b"", 200 << 20)
        try:
            for _ in range(200):
                handler.wfile.write(bytes(1 << 20))
        except OSError:
            told.set()  # the client has gone

    hub.files["/whole.parquet"] = OLD
    download_all([(hub.address + "/whole.parquet", tmp_path / "whole.parquet")])
    hub.faults["/endless.parquet"] = [endless] * 9
    names = ["whole", "endless", "missing"]
    line = refusal(download_all, [(f"{hub.address}/{name}.parquet", tmp_path / f"{name}.parquet") for name in names])
    assert "missing.parquet: not found (404)" in line
    assert told.wait(20)
    assert [path.name for path in tmp_path.glob("*")] == ["whole.parquet"]


def test_a_living_process_keeps_its_temporary_files(tmp_path):
    for name in (f"a.parquet.{os.getpid()}.part", f"tokens.{os.getppid()}.part", "mine.part"):
        (tmp_path / name).touch()
    (tmp_path / "tokens.999999999.part").mkdir()
    downloads.remove_leftovers(tmp_path)
    assert len(leftovers(tmp_path)) == 3
