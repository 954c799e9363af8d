"""Ends a server when whoever started it is gone, even by SIGKILL: a shell that waits at a pipe which only that process
holds open. (The kernel's own signal for the death of a parent comes when the *thread* ends that started the server.)
"""

import subprocess


class Watchdog:
    """Watches from its construction until `close`, which has to come before the server's process id is free again.

    Args:
        pid: of the server; gets SIGKILL.
    """

    def __init__(self, pid: int) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", f"read -r _; kill -9 {pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """Stop watching. Idempotent."""
        self._shell.kill()
        self._shell.communicate()
