"""Run a command on a terminal of its own; what it prints goes to our terminal and to a log.

usage: console.py LOG COMMAND …

So train.py sees a terminal and shows its progress, and run.log still has every line. Of a line that was
overwritten (by a carriage return) the log keeps the last state only. Exits as the command did.
"""

import fcntl
import os
import pty
import sys
import termios


def main(log_path, *command):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, fcntl.ioctl(1, termios.TIOCGWINSZ, b"\0" * 8))
    except OSError:
        pass  # the width is a nicety
    line = b""
    with open(log_path, "wb", buffering=0) as log:
        while chunk := read(terminal):
            os.write(1, chunk)
            *whole, line = (line + chunk.replace(b"\r\n", b"\n")).split(b"\n")
            for text in whole:
                log.write(last_state(text) + b"\n")
            line = last_state(line)
        log.write(line)
    status = os.waitpid(pid, 0)[1]
    sys.exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


def last_state(line):
    return line[line.rfind(b"\r", 0, -1) + 1 :]


if __name__ == "__main__":
    main(*sys.argv[1:])
