"""Becomes a service that does not outlive its `vllm-batch up`: `python -m ...leash PARENT_PID PROGRAM ARGS...`.

Without it a SIGKILL of `up` would leave services that write into a pipe nobody reads. Where the system has no
parent-death signal (anything but Linux), the next `up` or `down` finds them by their environment.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2); kept across execve


def main(parent: int, program: str, arguments: list[str]) -> None:
    """Ask for SIGTERM when `parent` dies, then replace this process by `program`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)  # it died before we asked
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
