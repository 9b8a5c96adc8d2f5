"""What a rehearsal runs in the place of compute-sanitizer.

``stand_in_sanitizer.py --tool NAME --error-exitcode N COMMAND...``: runs the command, whose device
is the simulator or the interpreter. Both report accesses out of bounds and races by themselves, as
an exception.
"""

from __future__ import annotations

import subprocess
import sys

_CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}


def main() -> int:
    _, tool, _, _, *command = sys.argv[1:]
    where = command.index("device")
    command[where] = "emulated"
    print("========= COMPUTE-SANITIZER", flush=True)
    done = subprocess.run(command)
    if done.returncode == 0:
        print(f"========= {_CLEAN[tool]}", flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
