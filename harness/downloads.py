"""Files from the hub: fetched whole, several at once, whatever the network does.

Nothing here knows a dataset. What fails ends the program with one line that names the address and what to do, and
leaves nothing behind that could be taken for a whole file.
"""

import hashlib
import os
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import urllib3

from harness.files import make_folder, move_into_place, printable, remove_leftovers

WORKERS = 8  # files at once
ATTEMPTS = 8  # requests for one file, in all
BACK_OFF = 1.0  # seconds before the second attempt, doubled for each further one
LONGEST_WAIT = 300.0  # seconds between two attempts, also where a busy server asks for more
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
PIECE = 2**18  # bytes written at once; a broken transfer loses at most so many
NEVER = threading.Event()  # for downloads that nothing stops
FROM_OUTSIDE = "HF_ENDPOINT, http_proxy, https_proxy, all_proxy and REQUESTS_CA_BUNDLE decide whom we ask and trust"


# --- one request -----------------------------------------------------------------------------------


def hub_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token():
    """The user's token for the hub and where it was found, as the hub's own client looks for it; or ("", "").

    HF_TOKEN, else the file that `hf auth login` writes: HF_TOKEN_PATH, or `token` in HF_HOME.
    """
    token, place = os.environ.get("HF_TOKEN", "").strip(), "HF_TOKEN"
    if not token:
        home = os.environ.get("HF_HOME") or (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/huggingface"
        place = os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")
        with suppress(OSError, ValueError):
            token = Path(place).read_text("utf-8").strip()
    if not all("!" <= character <= "~" for character in token):
        sys.exit(f"error: the token in {place} holds characters that no token has")
    return (token, place) if token else ("", "")


class BrokenAnswer(Exception):
    """An answer that another attempt may mend; its text says what is wrong with it."""


PASSING = (  # what may go better at another attempt
    BrokenAnswer, requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError,
    requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError,
)  # fmt: skip


def hub_get(url, receive, headers=dict, stop=NEVER):
    """What `receive(response)` makes of the answer to a GET of `url`. This is the one place where attempts are counted.

    headers: called for those of each attempt. `receive` raises `BrokenAnswer` where another attempt may mend the
    answer, as it may mend a failing connection or a busy server; all else ends the program at once, with one line.
    """
    if (offline := os.environ.get("HF_HUB_OFFLINE", "")).upper() in ("1", "ON", "YES", "TRUE"):
        sys.exit(f"error: {url} is not here yet, and HF_HUB_OFFLINE={offline} forbids fetching it; unset it")
    os.environ["NETRC"] = os.devnull  # requests would send what stands there, and in place of a token
    token, place = hub_token() if url.startswith(hub_endpoint() + "/") else ("", "")
    sign = {"Authorization": f"Bearer {token}"} if token else {}
    for attempt in range(ATTEMPTS):
        wait = BACK_OFF * 2**attempt
        try:
            with requests.get(url, headers=headers() | sign, stream=True, timeout=TIMEOUT) as response:
                with suppress(ValueError, OverflowError, urllib3.exceptions.InvalidHeader):
                    wait = max(wait, urllib3.Retry().get_retry_after(response) or 0.0)
                check_status(response, place)
                return receive(response)
        except (OSError, ValueError, *PASSING) as error:
            if getattr(error, "errno", None):
                raise  # of the disk here, not of the network
            reason = told(error)
            if isinstance(error, requests.exceptions.SSLError) or not isinstance(error, PASSING):
                sys.exit(f"error: {url}: {reason}; {FROM_OUTSIDE}")
        if attempt + 1 < ATTEMPTS:
            wait = min(wait, LONGEST_WAIT)
            if wait > 20:
                print(f"{url}: {reason}; next attempt in {wait:.0f} s", file=sys.stderr, flush=True)
            if stop.wait(wait):
                raise SystemExit  # another thread's failure ends the work
    sys.exit(f"error: {url}: given up after {ATTEMPTS} attempts ({reason}); run the same command again to go on")


def check_status(response, token_place):
    """End the program or raise `BrokenAnswer` where a server refuses. 416 is left to who asked for a range."""
    url, status = response.url, response.status_code
    if response.ok or status == 416:
        return
    if status in (404, 410):
        sys.exit(f"error: {url}: not found ({status})")
    if status in (401, 403) and url.startswith(hub_endpoint() + "/"):
        sent = f"not with the token in {token_place}, which may have run out" if token_place else "no token was sent"
        sys.exit(f"error: {url}: access denied ({status}): {sent}; set HF_TOKEN to one that may read it")
    # A signed address that the hub sent us to runs out; the next attempt gets a fresh one.
    raise BrokenAnswer(f"status {status} from {urllib3.util.parse_url(url).host}")


def told(error):
    """An exception of requests in one line: its kind, and the innermost of the causes that it wraps."""
    kind = type(error).__name__
    while inner := [e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, BaseException)]:
        error = inner[-1]
    return printable(f"{kind}: {' '.join(str(error).split())}")


# --- files -----------------------------------------------------------------------------------------


def hub_listing(repo):
    """The addresses of a dataset's parquet files, in the hub's order."""
    url = f"{hub_endpoint()}/api/datasets/{repo}/parquet"

    def receive(response):
        try:
            return [file for config in response.json().values() for split in config.values() for file in split]
        except (ValueError, AttributeError, TypeError, RecursionError):
            return None

    files = hub_get(url, receive)
    if not files or not all(isinstance(file, str) and file.isprintable() for file in files):
        sys.exit(f"error: {url}: the answer is no listing of parquet files")
    # The listing names the hub itself even where a mirror answers.
    return [file.replace("https://huggingface.co/", f"{hub_endpoint()}/", 1) for file in files]


def is_parquet(path):
    """Whether `path` is a whole parquet file (its footer can be read)."""
    try:
        pq.ParquetFile(path).close()
        return True
    except (OSError, pa.ArrowException):
        return False


def download(url, path, progress=lambda n: None, stop=NEVER):
    """Fetch one parquet file. `path` appears only once length, SHA-256 (where the hub names it) and footer are right.

    A broken transfer goes on where it stopped if the server still has the same file (If-Range with its ETag), else
    from the start.
    """
    if is_parquet(path):
        return
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    etag = None  # of the file whose beginning `part` is

    def headers():
        have = part.stat().st_size if etag else 0
        whole = {"Accept-Encoding": "identity"}  # a compressed answer has another length
        return whole | ({"Range": f"bytes={have}-", "If-Range": etag} if have else {})

    def receive(response):
        nonlocal etag
        have = part.stat().st_size if response.status_code != 200 else 0
        answered, before = response.headers, etag
        etag = answered.get("ETag")
        if response.status_code != 200 and not (
            response.status_code == 206
            and etag == before
            and answered.get("Content-Range", "").startswith(f"bytes {have}-")
        ):
            etag = None
            raise BrokenAnswer(f"status {response.status_code}, and not the rest of the file")
        if etag and etag.startswith("W/"):  # it does not stand for the very bytes
            etag = None
        with part.open("ab" if have else "wb") as out:
            for piece in response.iter_content(PIECE):
                out.write(piece)
                progress(len(piece))
        size, length, promised = part.stat().st_size, answered.get("Content-Length", ""), hash_by_hub(response)
        if length.isdecimal() and size != have + int(length):
            raise BrokenAnswer(f"{size} bytes arrived of {have + int(length)}")
        if promised not in ("", file_hash(part)) or not is_parquet(part):
            etag = None
            raise BrokenAnswer("what arrived is no whole parquet file, or not the one that the hub has")

    try:
        part.write_bytes(b"")
        hub_get(url, receive, headers, stop)
        move_into_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def hash_by_hub(response):
    """The SHA-256 of a large file, which the hub itself names before it redirects to where that lies; or ""."""
    tags = (answer.headers.get("X-Linked-ETag", "").strip('"') for answer in (*response.history, response))
    return next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), "")


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_all(jobs):
    """Fetch (url, path) pairs, several at once. The first failure ends the program; what is whole stays."""
    for folder in {path.parent for _, path in jobs}:
        remove_leftovers(folder)
    missing = [(url, path) for url, path in jobs if not is_parquet(path)]
    lock, stop, size, start, tty = threading.Lock(), threading.Event(), 0, time.monotonic(), sys.stderr.isatty()

    def progress(n):
        nonlocal size
        if stop.is_set():
            raise SystemExit
        with lock:
            size += n
            if tty:
                rate = size / 1e6 / max(time.monotonic() - start, 1e-3)
                print(f"\r{size / 1e6:,.0f} MB, {rate:.0f} MB/s ", end="", file=sys.stderr)

    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {pool.submit(download, url, path, progress, stop): path.name for url, path in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                print(f"downloaded {futures[future]} ({done}/{len(missing)})", file=sys.stderr, flush=True)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
