"""Python 3.11 as it is on macOS, as far as that can be had here: what only Linux has is taken away.

Read by every Python whose PYTHONPATH holds this folder.
"""

import os
import re
import select
import signal
import sys
import time

LINUX = {
    os: r"(waitid|P_(PID|PGID|ALL|PIDFD)|W(EXITED|STOPPED|NOWAIT)|CLD_.*|sched_.*affinity|sched_[gs]etscheduler"
    r"|pidfd_open|posix_f.*|fdatasync|[gs]etres[ug]id|pipe2|memfd_create|eventfd.*|getrandom|copy_file_range|splice"
    r"|O_(DIRECT|PATH|TMPFILE|LARGEFILE|NOATIME)|.*xattr|unshare|setns)",
    signal: r"(sigwaitinfo|sigtimedwait|pidfd_send_signal|SIG(RTMIN|RTMAX|POLL|PWR|STKFLT|CLD))",
    select: r"(epoll|EPOLL.*)",
    time: r"(CLOCK_(BOOTTIME|TAI|.*_COARSE)|pthread_getcpuclockid)",
}
for module, names in LINUX.items():
    for name in [name for name in vars(module) if re.fullmatch(names, name)]:
        delattr(module, name)


def absent(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and re.match(r"/proc(/|$)", str(arguments[0])):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))


def stat(path, *more, _real=os.stat, **options):
    absent("open", (path,))
    return _real(path, *more, **options)


sys.addaudithook(absent)
os.stat = stat
