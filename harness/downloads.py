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

from harness.files import make_folder, move_into_place, printable, remove_leftovers

WORKERS = 8  # files at once
ATTEMPTS = 8  # requests for one file, in all
BACK_OFF = 1.0  # seconds before the second attempt, doubled for each further one
LONGEST_WAIT = 300.0  # seconds, where a busy server asks for more
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
PIECE = 2**18  # bytes written at once


def hub_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token():
    """The user's token for the hub: HF_TOKEN, else the one that `hf auth login` stored, else an empty text."""
    stored = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface"), "token")
    text = os.environ.get("HF_TOKEN") or (stored.read_text("utf-8", "replace") if stored.is_file() else "")
    return text.strip().partition("\n")[0]


def is_parquet(path):
    """Whether `path` is a whole parquet file (its footer can be read)."""
    try:
        pq.ParquetFile(path).close()
        return True
    except (OSError, pa.ArrowException):
        return False


def fetch(url, part, stop):
    """One request for `url`, written to the file `part`. Raises a `RequestException` where another may do better."""
    hub, headers = hub_endpoint() + "/", {"Accept-Encoding": "identity"}
    os.environ["NETRC"] = os.devnull  # requests would send what stands there, and in place of a token
    if url.startswith(hub) and (token := hub_token()):
        headers["Authorization"] = f"Bearer {token}"  # requests takes it along to no other host
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if (status := response.status_code) in (401, 403, 404) and response.url.startswith(hub):
            sys.exit(f"error: {printable(url)}: status {status}: not there, or it takes an HF_TOKEN that may read it")
        if status != 200:  # a signed address that the hub sent us to runs out, too: the next attempt gets a fresh one
            if (seconds := response.headers.get("Retry-After", "")).isdecimal():
                stop.wait(min(float(seconds), LONGEST_WAIT))
            raise requests.RequestException(f"status {status} from {urllib3.util.parse_url(response.url).host}")
        with part.open("wb") as out:
            for piece in response.iter_content(PIECE):  # raises where fewer bytes come than were announced
                if stop.is_set():
                    raise SystemExit  # another file's failure ends the work
                out.write(piece)
    if not is_parquet(part):
        raise requests.RequestException("what arrived is no whole parquet file")


def download(url, path, stop):
    """Fetch one parquet file. `path` appears only once its length and footer are right.

    Another attempt, from the start, is made where the connection or the server fails; `stop`, an event, ends the
    waiting for it. What no other attempt would mend ends the program at once.
    """
    place, part = printable(url), path.with_name(f"{path.name}.{os.getpid()}.part")
    if (offline := os.environ.get("HF_HUB_OFFLINE", "")).upper() in ("1", "ON", "YES", "TRUE"):
        sys.exit(f"error: {place} is not here yet, and HF_HUB_OFFLINE={offline} forbids fetching it; unset it")
    try:
        for attempt in range(ATTEMPTS):
            try:
                fetch(url, part, stop)
                return move_into_place(part, path)
            except (requests.exceptions.SSLError, ValueError) as error:  # whose certificate, or whose address, is none
                mend = "see HF_ENDPOINT, the proxy's variables, REQUESTS_CA_BUNDLE"
                sys.exit(f"error: {place}: {printable(error)}; {mend}")
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                reason = printable(f"{type(error).__name__}: {error}")
            if attempt + 1 < ATTEMPTS:
                print(f"{place}: {reason}; again in {BACK_OFF * 2**attempt:.0f} s", file=sys.stderr, flush=True)
                if stop.wait(BACK_OFF * 2**attempt):
                    raise SystemExit
    finally:
        part.unlink(missing_ok=True)
    sys.exit(f"error: {place}: given up after {ATTEMPTS} attempts ({reason}); run the same command again to go on")


def download_all(repo, paths):
    """Fetch files of a dataset of the hub, several at once. The first failure ends the program; whole files stay."""
    stop, base = threading.Event(), f"{hub_endpoint()}/datasets/{repo}/resolve/main"
    make_folder(paths[0].parent)
    remove_leftovers(paths[0].parent)
    missing = [path for path in paths if not is_parquet(path)]
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {pool.submit(download, f"{base}/{path.name}", path, stop): path.name for path in missing}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                print(f"downloaded {futures[future]} ({done}/{len(missing)})", file=sys.stderr, flush=True)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
