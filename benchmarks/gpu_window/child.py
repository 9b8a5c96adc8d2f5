"""A child process: runs the cases of one module, and writes each row when it has it.

``python -m gpu_window.child SETTINGS``, a JSON document of :meth:`gpu_window.children.Job.command`.
Messages are lines of JSON on stdout; whatever else the process prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: Exit code after a case that left the CUDA context unusable.
LOST = 3


def main() -> int:
    settings = json.loads(sys.argv[1])
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    if settings["stub"]:
        stub_package()
    from fused_resnet.bench.gpu import cases as protocol

    if settings["rehearse"]:
        from gpu_window.rehearsal_target import rehearsal_target

        target = rehearsal_target(settings["stub"])
    else:
        target = protocol.card_target()
    module = importlib.import_module(settings["module"])
    found = [case for case in module.cases(target, **settings["options"])]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), f"two cases of one name in {settings['module']}"
    say(cases=names)
    waiting = [case for case in found if case.name not in settings["done"]]
    while waiting:
        if time.monotonic() > settings["deadline"] - 1:
            say(left=[case.name for case in waiting])
            break
        case = waiting.pop(0)
        say(begin=case.name)
        try:
            for row in case.run():
                say(row=row)
        except protocol.UnavailableError as error:
            say(row=protocol.unavailable(case, str(error)))
        except Exception as error:
            traceback.print_exc()
            say(row=protocol.failed(case, error))
            if target.lost():
                say(end=case.name)
                return LOST
        say(end=case.name)
    say(completed=True)
    messages.close()
    return 0


def stub_package() -> None:
    """Let the parts of the package that need no build be imported before there is one.

    Only ``fused_resnet/__init__.py`` is left out, which loads the extension: modules keep their
    names, which are part of the keys of Triton's cache.
    """
    module = types.ModuleType("fused_resnet")
    module.__path__ = [str(ROOT / "fused_resnet")]
    sys.modules["fused_resnet"] = module


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's way out: a lost CUDA context may hang in it.
    os._exit(code)
