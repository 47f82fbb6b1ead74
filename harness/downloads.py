"""Files from the hub: fetched whole, several at once, through whatever a network does.

Nothing here knows a dataset. What fails ends the program with one line that names the address and the mend, and
leaves nothing behind that could be taken for a whole file.
"""

import hashlib
import os
import re
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import urllib3

from harness.files import make_folder, move_into_place, printable, remove_leftovers

WORKERS = 8  # files at once
ATTEMPTS = 6  # tries a file
BACK_OFF = 1.0  # seconds before the second try, doubled for each further one
PIECE = 2**18  # bytes written at once; a broken transfer loses at most so many
LONGEST_WAIT = 300.0  # seconds that a busy server may ask for
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
NEVER = threading.Event()  # for downloads that nothing stops


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
        place = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
        try:
            token = place.read_text("utf-8").strip()
        except (OSError, ValueError):
            token = ""
    if not all("!" <= character <= "~" for character in token):
        sys.exit(f"error: the token in {place} holds characters that no token has")
    return (token, str(place)) if token else ("", "")


class Client(requests.Session):
    """Sends the credentials that it is given to the host that they are for, and never those of a .netrc.

    requests would put a .netrc in the place of a token, at the start and after each redirect.
    """

    def rebuild_auth(self, prepared_request, response):
        if self.should_strip_auth(response.request.url, prepared_request.url):
            prepared_request.headers.pop("Authorization", None)


def hub_get(url, stop=NEVER, **options):
    """GET with retries and, towards the hub itself, the user's token. What no retry mends ends the program at once."""
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    if offline.upper() in ("1", "ON", "YES", "TRUE"):
        sys.exit(
            f"error: {url} is not here yet, and HF_HUB_OFFLINE={offline} forbids fetching it; unset HF_HUB_OFFLINE"
        )
    token, place = hub_token() if url.startswith(hub_endpoint() + "/") else ("", "")

    def sign(request):
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    for attempt in range(ATTEMPTS):
        wait = BACK_OFF * 2**attempt
        try:
            with Client() as client:
                response = client.get(url, auth=sign, timeout=TIMEOUT, **options)
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:
            if mend := hopeless(error, url):
                sys.exit(f"error: {url}: {mend}")
            reason = told(error)
            if isinstance(error, requests.exceptions.ProxyError):
                reason += f"; {proxy_of(url)[1]} names the proxy"
        else:
            status = response.status_code
            if response.ok or status == 416:
                return response
            response.close()
            if status in (401, 403):
                refused = f"not with the token in {place}, which may have run out" if token else "no token was sent"
                sys.exit(f"error: {url}: access denied ({status}): {refused}; set HF_TOKEN to one that may read it")
            if status in (404, 410):
                sys.exit(f"error: {url}: not found ({status})")
            reason, wait = f"status {status}", max(wait, asked_to_wait(response))
        if attempt + 1 < ATTEMPTS:
            if wait > 20:
                print(f"{url}: {reason}; next try in {wait:.0f} s", file=sys.stderr, flush=True)
            pause(wait, stop)
    give_up(url, reason)


def asked_to_wait(response):
    """Seconds that a busy server asks for, in either form that Retry-After has; LONGEST_WAIT at most."""
    text, seconds = response.headers.get("Retry-After", "").strip(), 0.0
    with suppress(ValueError, TypeError, OverflowError):
        seconds = float(text) if text.isdecimal() else parsedate_to_datetime(text).timestamp() - time.time()
    return min(max(seconds, 0.0), LONGEST_WAIT)


def root_of(error):
    """The innermost of the exceptions that requests and urllib3 wrap in each other."""
    while True:
        inner = [getattr(error, "reason", None), getattr(error, "original_error", None), *error.args[:1]]
        inner = [e for e in inner if isinstance(e, BaseException)]
        if not inner:
            return error
        error = inner[0]


def told(error):
    """What went wrong, in one line that a terminal can show."""
    root = root_of(error)
    text = re.sub(r"^(<[^>]*>|HTTPS?Connection\([^)]*\)): ", "", " ".join(str(root).split()))
    return printable(f"{type(root).__name__}: {text}")


def proxy_of(url):
    """The proxy that requests would ask for `url`, and which variables name it; ("", "") where there is none."""
    try:
        proxy = requests.utils.select_proxy(url, requests.utils.get_environ_proxies(url))
    except ValueError:  # no address
        proxy = None
    names = [name for name, value in os.environ.items() if name.lower().endswith("_proxy") and value == proxy]
    return (proxy, " and ".join(sorted(names)) or "the system") if proxy else ("", "")


def hopeless(error, url):
    """The mend of a failure that would be the same at every further attempt, or None."""
    root, (proxy, place) = root_of(error), proxy_of(url)
    if proxy and "SOCKS" in str(error):
        install = f"{sys.executable} -m pip install PySocks"
        return f"{place} names a SOCKS proxy, for which Python needs a package: {install}, or unset {place}"
    if proxy and isinstance(root, (requests.exceptions.InvalidProxyURL, urllib3.exceptions.ProxySchemeUnknown)):
        return f"{place} names a proxy by what is no address; it looks like http://host:port"
    if isinstance(root, ssl.SSLCertVerificationError):
        trust = "where a proxy opens TLS on purpose, REQUESTS_CA_BUNDLE names the file with its certificate"
        return f"the certificate is not to be trusted ({root.verify_message}); {trust}"
    if isinstance(root, ssl.SSLError) and root.reason == "WRONG_VERSION_NUMBER":
        return "the server speaks no TLS; is it http:// in HF_ENDPOINT or in the proxy's address?"
    if isinstance(error, requests.TooManyRedirects):
        return "it redirects for ever"
    if isinstance(error, ValueError):  # how requests calls a malformed address
        return f"no address to fetch from ({told(error)}); HF_ENDPOINT={hub_endpoint()} is the hub's, with https://"
    if not isinstance(error, (requests.RequestException, urllib3.exceptions.HTTPError)):
        return told(error)  # a file that requests was told to use, a bundle of certificates most often
    return None


# --- files -----------------------------------------------------------------------------------------


def hub_listing(repo):
    """The addresses of a dataset's parquet files, in the hub's order."""
    url = f"{hub_endpoint()}/api/datasets/{repo}/parquet"
    with hub_get(url) as response:
        try:
            urls = [file for config in response.json().values() for split in config.values() for file in split]
            # The listing names the hub itself even where a mirror answered.
            urls = [file.replace("https://huggingface.co/", f"{hub_endpoint()}/", 1) for file in urls]
        except (ValueError, AttributeError, TypeError, RecursionError):
            sys.exit(f"error: {url}: the answer is not a listing of parquet files")
    if not all(file.isprintable() for file in urls):
        sys.exit(f"error: {url}: the listing holds what is no address")
    if not urls:
        sys.exit(f"error: the hub lists no parquet file for {repo}")
    return urls


def pause(seconds, stop):
    """Sleep; ends the thread where another one's failure stops the work."""
    if stop.wait(seconds):
        raise SystemExit


def give_up(url, reason):
    sys.exit(f"error: {url}: given up after {ATTEMPTS} attempts ({reason}); run the same command again to go on")


def is_parquet(path):
    """Whether `path` is a whole parquet file (its footer can be read)."""
    try:
        pq.ParquetFile(path).close()
        return True
    except (OSError, pa.ArrowException):
        return False


def download(url, path, progress=lambda n: None, stop=NEVER):
    """Fetch one parquet file. `path` appears only once the length and the footer are right.

    A broken transfer goes on where it stopped if the server has the same file still (If-Range
    with its ETag), else from the start. Raises SystemExit with one line when it is given up.
    """
    if is_parquet(path):
        return
    make_folder(path.parent)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    etag, reason = None, ""
    try:
        part.write_bytes(b"")
        for attempt in range(ATTEMPTS):
            if attempt:
                pause(BACK_OFF * 2 ** (attempt - 1), stop)
            have = part.stat().st_size if etag else 0
            headers = {"Accept-Encoding": "identity"}  # a compressed answer has another length
            if have:
                headers |= {"Range": f"bytes={have}-", "If-Range": etag}
            try:
                with hub_get(url, stop, headers=headers, stream=True) as response:
                    answered = response.headers
                    if response.ok and "text/html" in answered.get("Content-Type", "").lower():
                        sys.exit(f"error: {url}: a web page came in its place; a login, or a proxy in between?")
                    if response.status_code != 200 and not continues(response, have, etag):
                        reason, etag = f"status {response.status_code}, and not what was asked for", None
                        continue
                    if response.status_code == 200:
                        have = 0
                    tag, length = answered.get("ETag", ""), answered.get("Content-Length", "")
                    promised = hash_by_hub(response)
                    etag = tag if tag and not tag.startswith("W/") else None
                    expected = have + int(length) if length.isdecimal() else None
                    with part.open("ab" if have else "wb") as out:
                        for piece in response.iter_content(PIECE):
                            out.write(piece)
                            progress(len(piece))
            except requests.RequestException as error:
                reason = told(error)
                continue
            size = part.stat().st_size
            if expected is not None and size != expected:
                reason = f"{size} bytes arrived of {expected}"
            elif promised and file_hash(part) != promised:
                reason, etag = "what arrived is not what the hub has: its SHA-256 is another", None
            elif not is_parquet(part):
                reason, etag = "what arrived is no whole parquet file", None
            else:
                move_into_place(part, path)
                return
        give_up(url, reason)
    finally:
        part.unlink(missing_ok=True)


def hash_by_hub(response):
    """The SHA-256 of a large file, which the hub itself names before it redirects to where that lies; or ""."""
    tags = (answer.headers.get("X-Linked-ETag", "").strip('"') for answer in (*response.history, response))
    return next((tag for tag in tags if re.fullmatch("[0-9a-f]{64}", tag)), "")


def continues(response, have, etag):
    """Whether an answer holds the rest, from byte `have` on, of the very file that `etag` names."""
    start = response.headers.get("Content-Range", "")
    same = response.headers.get("ETag") == etag
    return response.status_code == 206 and same and start.startswith(f"bytes {have}-")


def download_all(jobs):
    """Fetch (url, path) pairs, several at once. The first failure ends the program; what is whole stays."""
    for folder in {path.parent for _, path in jobs}:
        remove_leftovers(folder)
    missing = [(url, path) for url, path in jobs if not is_parquet(path)]
    if not missing:
        return
    lock, stop, done, size = threading.Lock(), threading.Event(), 0, 0
    start, tty = time.monotonic(), sys.stderr.isatty()

    def progress(n):
        nonlocal size
        if stop.is_set():
            raise SystemExit
        with lock:
            size += n
            if tty:
                rate = size / 1e6 / max(time.monotonic() - start, 1e-3)
                print(f"\r{done}/{len(missing)} files, {size / 1e6:,.0f} MB, {rate:.0f} MB/s ", end="", file=sys.stderr)

    def job(pair):
        nonlocal done
        download(*pair, progress, stop)
        with lock:
            done += 1
            if not tty:
                print(f"downloaded {pair[1].name} ({done}/{len(missing)})", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(job, pair) for pair in missing]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            if tty:
                print(file=sys.stderr)


# --- files on this machine ---------------------------------------------------------------------------


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
