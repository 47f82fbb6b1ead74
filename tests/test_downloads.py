"""Downloads: whole through every fault of a network, or a line that says what to do. The hub is on this machine."""

import email.utils
import errno
import os
import subprocess
import threading
import time

import hub as faulty
import pytest
from hub import Hub, hub_of_a_test, leftovers, parquet, refusal, serving, texts  # noqa: F401

from harness import downloads
from harness.downloads import download_all

SHARD = "/shard.parquet"
BODY = parquet(20 * texts(0, 300))


class Waits(list):
    """Takes the place of the event that stops a download: notes how long was to be waited, and waits not."""

    def wait(self, seconds):
        self.append(seconds)

    def is_set(self):
        return False


def download(url, path, stop=None):
    downloads.download(url, path, Waits() if stop is None else stop)


# --- one file ------------------------------------------------------------------------------------

FAULTS = {
    "server errors": [500, 502, 503],
    "too many requests": [faulty.busy(0)],
    "connection reset": [faulty.reset, faulty.reset],
    "cut short": [faulty.cut],
    "length too small": [faulty.claims_less],
    "no length, cut short": [faulty.no_length_cut],
    "a part that nobody asked for": [206],
    "silence": [faulty.stall(0.4)],
    "compressed on the way": [faulty.compressed],
    "all of it together": [503, faulty.cut, faulty.reset, faulty.busy(0), faulty.claims_less, faulty.no_length_cut],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
def test_a_download_comes_whole_through_any_fault(hub, tmp_path, monkeypatch, faults):
    monkeypatch.setattr(downloads, "TIMEOUT", (10, 0.2))
    hub.files[SHARD], hub.faults[SHARD] = BODY, list(faults)
    download(hub.address + SHARD, tmp_path / "shard.parquet")
    assert (tmp_path / "shard.parquet").read_bytes() == BODY
    assert not hub.faults[SHARD]  # all of them were met
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(500, "status 500"), (faulty.reset, "Connection"), (faulty.claims_less, "no whole parquet"),
     (faulty.cut, "IncompleteRead")],
)  # fmt: skip
def test_what_never_gets_better_is_given_up_and_leaves_nothing(hub, tmp_path, fault, words):
    hub.files[SHARD], hub.faults[SHARD], waits = BODY, [fault] * 100, Waits()
    line = refusal(download, hub.address + SHARD, tmp_path / "shard.parquet", waits)
    assert f"given up after {downloads.ATTEMPTS} attempts" in line and words in line and SHARD in line
    assert len(hub.seen) == downloads.ATTEMPTS == len(waits) + 1  # one count for whatever fails
    assert list(tmp_path.iterdir()) == []


def test_the_waits_between_attempts_grow_to_a_limit_and_a_busy_server_is_heard(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "BACK_OFF", 1.0)
    dates = [email.utils.formatdate(time.time() + seconds, usegmt=True) for seconds in (100, -100)]
    odd = [faulty.busy(text) for text in ("soon", "-5", "Thu, 99 Foo 2030 00:00:00 GMT")]
    hub.files[SHARD], url = BODY, hub.address + SHARD
    for faults, wanted in (
        ([500, 500, 500, faulty.busy(90), faulty.busy(10**6)], [1, 2, 4, 90, downloads.LONGEST_WAIT]),
        ([faulty.busy(date) for date in dates], [100, 2]),
        (odd, [1, 2, 4]),
    ):
        hub.faults[SHARD], waits = faults, Waits()
        download(url, tmp_path / f"{len(hub.seen)}.parquet", waits)
        assert waits == pytest.approx(wanted, abs=20 if wanted[0] == 100 else 0)
    assert "status 429 from 127.0.0.1; next attempt in 90 s" in capsys.readouterr().err


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_by_the_hub_ends_at_once(hub, tmp_path, status):
    hub.faults[SHARD] = [status] * 9
    line = refusal(download, hub.address + SHARD, tmp_path / "shard.parquet")
    assert f"{SHARD}: status {status}" in line and "HF_TOKEN" in line
    assert len(hub.seen) == 1 and list(tmp_path.iterdir()) == []


@pytest.fixture
def elsewhere():
    """A store on another host, to which a hub sends its visitors."""
    store = Hub()
    store.files = {SHARD: BODY, "/direct.parquet": BODY}
    with serving(store) as address:
        store.address = address.replace("127.0.0.1", "localhost")
        yield store


def test_a_signed_address_that_has_run_out_is_asked_for_anew(hub, elsewhere, tmp_path):
    """The hub sends to a store by an address that holds for a while; what refuses it says nothing of a token."""
    hub.faults[SHARD], elsewhere.faults[SHARD] = [faulty.to(elsewhere.address)] * 2, [403]
    download(hub.address + SHARD, tmp_path / "shard.parquet")
    assert (tmp_path / "shard.parquet").read_bytes() == BODY and len(hub.seen) == 2
    hub.faults[SHARD], elsewhere.faults[SHARD] = [faulty.to(elsewhere.address)] * 99, [403] * 99
    line = refusal(download, hub.address + SHARD, tmp_path / "other.parquet")
    assert "status 403 from localhost" in line and "HF_TOKEN" not in line


@pytest.mark.parametrize("token", ["secret\n", None])
def test_the_token_goes_to_the_hub_alone_and_a_netrc_nowhere(hub, elsewhere, tmp_path, monkeypatch, token):
    (tmp_path / "netrc").write_text("default login somebody password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.files[SHARD], elsewhere.files["/moved.parquet"] = BODY, BODY
    hub.faults["/moved.parquet"] = [faulty.to(elsewhere.address)]
    for url in (hub.address + SHARD, hub.address + "/moved.parquet", elsewhere.address + "/direct.parquet"):
        download(url, tmp_path / "shard.parquet")
    assert [headers.get("Authorization") for _, headers, _ in hub.seen] == 2 * [token and "Bearer secret"]
    assert ["Authorization" in headers for _, headers, _ in elsewhere.seen] == [False, False]


@pytest.mark.parametrize("names", [{"HF_HOME": "{}/.cache/huggingface"}, {"HOME": "{}", "HF_TOKEN": ""}])
def test_the_stored_token_of_a_login_is_used(hub, tmp_path, monkeypatch, names):
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("stored\n")
    for name, value in names.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    hub.files[SHARD] = BODY
    download(hub.address + SHARD, tmp_path / "first.parquet")
    monkeypatch.setenv("HF_TOKEN", "given")  # goes before it
    download(hub.address + SHARD, tmp_path / "second.parquet")
    assert [headers["Authorization"] for _, headers, _ in hub.seen] == ["Bearer stored", "Bearer given"]


def at_once(url, path):
    """The line that a download ends with, without another attempt."""
    waits = Waits()
    line = refusal(download, url, path, waits)
    assert not waits
    return line


@pytest.mark.parametrize("token", ["line\nbreak", "tökén"])
def test_a_token_that_none_is_is_not_shown(hub, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    line = at_once(hub.address + SHARD, tmp_path / "shard.parquet")
    assert "HF_TOKEN" in line and token.split()[0] not in line and not hub.seen


@pytest.mark.parametrize("endpoint", ["mirror.example", "http://", "ftp://mirror.example", "https://[::1"])
def test_an_address_that_is_none_is_said_at_once(cache, tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "see HF_ENDPOINT" in at_once(downloads.hub_endpoint() + SHARD, tmp_path / "shard.parquet")


@pytest.mark.parametrize("proxy", ["http://", "gopher://somebody:password@127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_said_at_once(hub, tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("all_proxy", proxy)
    line = at_once(hub.address + SHARD, tmp_path / "shard.parquet")
    assert "proxy" in line and "password" not in line


def test_offline_is_said_at_once_and_nobody_is_asked(hub, tmp_path, monkeypatch):
    hub.files[SHARD] = BODY
    job = [(hub.address + SHARD, tmp_path / "shard.parquet")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    line = refusal(download_all, job)
    assert "unset it" in line and SHARD in line and not hub.seen
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    download_all(job)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    download_all(job)  # what is here needs no network
    assert len(hub.seen) == 1


def test_a_certificate_that_does_not_fit_is_said_at_once(hub, tmp_path):
    key, path = tmp_path / "other.pem", tmp_path / "shard.parquet"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=other.example -keyout".split()
    try:
        subprocess.run([*words, key, "-out", tmp_path / "crt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl that makes certificates")
    key.write_text(key.read_text() + (tmp_path / "crt").read_text())
    with serving(hub, key) as address:
        line = at_once(address + SHARD, path)
    assert "self-signed" in line and "REQUESTS_CA_BUNDLE" in line
    assert not hub.seen and not path.exists()


def test_a_full_disk_is_not_taken_for_the_network_s_fault(hub, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    hub.files[SHARD] = BODY
    monkeypatch.setattr(downloads, "file_hash", full)
    with pytest.raises(OSError, match="full"):
        download(hub.address + SHARD, tmp_path / "shard.parquet")
    assert len(hub.seen) == 1 and not list(tmp_path.iterdir())


def test_what_a_hub_says_cannot_write_to_the_terminal(hub, tmp_path):
    hub.files["/api/datasets/some/one/parquet"] = faulty.listing("https://huggingface.co/\x1b[2J.parquet")
    (url,) = downloads.hub_listing("some/one")
    assert "[2J" in refusal(download, url, tmp_path / "shard.parquet")  # which sees that the line is printable


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

    hub.files["/whole.parquet"] = BODY
    download_all([(hub.address + "/whole.parquet", tmp_path / "whole.parquet")])
    hub.faults["/endless.parquet"] = [endless] * 9
    names = ["whole", "endless", "missing"]
    line = refusal(download_all, [(f"{hub.address}/{name}.parquet", tmp_path / f"{name}.parquet") for name in names])
    assert "missing.parquet: status 404" in line
    assert told.wait(20)
    assert [path.name for path in tmp_path.glob("*")] == ["whole.parquet"]


def test_a_living_process_keeps_its_temporary_files(tmp_path):
    for name in (f"a.parquet.{os.getpid()}.part", f"tokens.{os.getppid()}.part", "mine.part"):
        (tmp_path / name).touch()
    (tmp_path / "tokens.999999999.part").mkdir()
    downloads.remove_leftovers(tmp_path)
    assert len(leftovers(tmp_path)) == 3
