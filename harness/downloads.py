"""Files from the hub: fetched whole, several at once, whatever the network does.

Nothing here knows a dataset. What fails ends the program with one line that names the address and what to do, and
leaves nothing behind that could be taken for a whole file.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import urllib3

from harness.files import file_hash, make_folder, move_into_place, printable, remove_leftovers

WORKERS = 8  # files at once
ATTEMPTS = 8  # requests for one file, in all
BACK_OFF = 1.0  # seconds before the second attempt, doubled for each further one
LONGEST_WAIT = 300.0  # seconds between two attempts, also where a busy server asks for more
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
PIECE = 2**18  # bytes written at once


def hub_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token():
    """The user's token for the hub: HF_TOKEN, else the one that `hf auth login` stored, else an empty text."""
    stored = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"), "token")
    token = (os.environ.get("HF_TOKEN") or (stored.read_text("utf-8", "replace") if stored.is_file() else "")).strip()
    if not token.isascii() or not token.isprintable():
        sys.exit("error: HF_TOKEN, or the token that `hf auth login` stored, holds characters that no token has")
    return token


def hub_get(url, receive, stop):
    """What `receive(response)` makes of the answer to a GET of `url`. This is the one place where attempts are counted.

    Another attempt is made where the connection or the server fails, or `receive` raises a `RequestException`; `stop`
    ends the waiting for it. What no other attempt would mend ends the program at once, with one line.
    """
    place, hub = printable(url), hub_endpoint() + "/"
    if (offline := os.environ.get("HF_HUB_OFFLINE", "")).upper() in ("1", "ON", "YES", "TRUE"):
        sys.exit(f"error: {place} is not here yet, and HF_HUB_OFFLINE={offline} forbids fetching it; unset it")
    os.environ["NETRC"] = os.devnull  # requests would send what stands there, and in place of a token
    headers = {"Accept-Encoding": "identity"}
    if url.startswith(hub) and (token := hub_token()):
        headers["Authorization"] = f"Bearer {token}"  # requests takes it along to no other host
    for attempt in range(ATTEMPTS):
        wait = BACK_OFF * 2**attempt
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
                wait = max(wait, urllib3.Retry().get_retry_after(response) or 0.0)
                if (status := response.status_code) == 200:
                    return receive(response)
                if status in (401, 403, 404) and response.url.startswith(hub):
                    sys.exit(f"error: {place}: status {status}: not there, or it takes an HF_TOKEN that may read it")
                # A signed address that the hub sent us to runs out, too: the next attempt gets a fresh one.
                raise requests.RequestException(f"status {status} from {urllib3.util.parse_url(response.url).host}")
        except (requests.exceptions.SSLError, ValueError) as error:  # whose certificate, or whose address, is none
            sys.exit(f"error: {place}: {printable(error)}; see HF_ENDPOINT, the proxy's variables, REQUESTS_CA_BUNDLE")
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason, wait = printable(f"{type(error).__name__}: {error}"), min(wait, LONGEST_WAIT)
        if attempt + 1 < ATTEMPTS:
            if wait > 20:
                print(f"{place}: {reason}; next attempt in {wait:.0f} s", file=sys.stderr, flush=True)
            if stop.wait(wait):
                raise SystemExit  # another thread's failure ends the work
    sys.exit(f"error: {place}: given up after {ATTEMPTS} attempts ({reason}); run the same command again to go on")


def hub_listing(repo):
    """The addresses of a dataset's parquet files, in the hub's order."""
    url = f"{hub_endpoint()}/api/datasets/{repo}/parquet"
    try:
        configs = hub_get(url, requests.Response.json, threading.Event())
        files = [file for splits in configs.values() for split in splits.values() for file in split]
        # The listing names the hub itself even where a mirror answers.
        files = [file.replace("https://huggingface.co/", f"{hub_endpoint()}/", 1) for file in files]
    except (AttributeError, TypeError, RecursionError):
        files = []
    return files or sys.exit(f"error: {printable(url)} lists no parquet files")


def is_parquet(path):
    """Whether `path` is a whole parquet file (its footer can be read)."""
    try:
        pq.ParquetFile(path).close()
        return True
    except (OSError, pa.ArrowException):
        return False


def download(url, path, stop):
    """Fetch one parquet file. `path` appears only once length, SHA-256 (where the hub names it) and footer are right.

    A transfer that broke begins anew. The event `stop` ends it.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")

    def receive(response):
        with part.open("wb") as out:
            for piece in response.iter_content(PIECE):  # raises where fewer bytes come than were announced
                if stop.is_set():
                    raise SystemExit
                out.write(piece)
        # Of a large file the hub itself names the SHA-256, before it redirects to where that lies.
        tags = (answer.headers.get("X-Linked-ETag", "").strip('"') for answer in (*response.history, response))
        if {tag for tag in tags if len(tag) == 64} - {file_hash(part)} or not is_parquet(part):
            raise requests.RequestException("what arrived is no whole parquet file, or not the one that the hub has")

    try:
        hub_get(url, receive, stop)
        move_into_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def download_all(jobs):
    """Fetch (url, path) pairs into a folder, several at once. The first failure ends the program; whole files stay."""
    folder, stop = jobs[0][1].parent, threading.Event()
    make_folder(folder)
    remove_leftovers(folder)
    missing = [(url, path) for url, path in jobs if not is_parquet(path)]
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {pool.submit(download, url, path, stop): path.name for url, path in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                print(f"downloaded {futures[future]} ({done}/{len(missing)})", file=sys.stderr, flush=True)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
