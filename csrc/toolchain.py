"""Runs compilers and linkers for setup.py: what has changed alone, and several at a time."""

import os
import resource
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
CXX, CFLAGS, LDFLAGS = (
    shlex.split(os.environ.get(name, default))
    for name, default in (("CXX", "g++"), ("CFLAGS", ""), ("LDFLAGS", ""))
)
CCACHE = ["ccache"] if shutil.which("ccache") else []
# As many as the process may use, also in a container with a quota.
PROCESSORS = runpy.run_path(str(ROOT / "fused_resnet/tuning/processor.py"))["available"]()
JOBS = os.environ.get("MAX_JOBS") or str(PROCESSORS)
if not JOBS.isdigit() or int(JOBS) < 1:
    raise SystemExit(f"fused_resnet: MAX_JOBS: expected a number of at least 1, got {JOBS!r}")


class Binary(Extension):
    """A shared library.

    Args:
        name: As that of a Python module; the file of one whose name begins with ``lib`` has no
            suffix that names a Python.
        commands: The compiler of each source with its flags, the slowest first. The sources of a
            folder are compiled as one, so that the headers that they share are read once.
        links: Flags of the linker.
    """

    def __init__(self, name: str, commands: dict[str, list[str]], links: list[str]) -> None:
        super().__init__(name, [])
        self.commands, self.links = commands, links


class Build(build_ext):
    """setuptools' command ``build_ext``, for binaries."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # In the source folder also for an editable install, whose own would be a temporary one: a
        # build that was interrupted goes on, and one after a change compiles what has changed.
        self.build_temp = str(ROOT / "build" / "objects")

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2].startswith("lib"):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        # The sources of all binaries together, so that no processor waits for the last of one. The
        # binary that is linked last has a single large source, which is begun first.
        units = {name: line for ext in self.extensions[::-1] for name, line in ext.commands.items()}
        with ThreadPoolExecutor(int(JOBS)) as pool:
            made = pool.map(self._object, units, units.values())
            self.objects = dict(zip(units, made, strict=True))
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext: Binary) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = [self.objects[source] for source in ext.commands]
        flags = [f"-L{target.parent}", *ext.links, *CFLAGS, *LDFLAGS]
        _run([*CXX, "-shared", "-o", str(target), *objects, *flags])
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        print(f"fused_resnet: {target.name}, after {seconds:.0f} s of compiling", flush=True)

    def _source(self, unit: str) -> str:
        """The file to compile: a source itself, or one that includes those of a folder."""
        if not Path(ROOT, unit).is_dir():
            return unit
        path = Path(self.build_temp, unit).with_suffix(".cpp")
        path.parent.mkdir(parents=True, exist_ok=True)
        sources = sorted(Path(ROOT, unit).glob("*.cpp"))
        lines = [f'#include "{os.path.relpath(source, path.parent)}"\n' for source in sources]
        if not path.exists() or path.read_text() != "".join(lines):
            path.write_text("".join(lines))
        return os.path.relpath(path, ROOT)

    def _object(self, unit: str, command: list[str]) -> str:
        """The object file of a unit, compiled if it, a header or its command has changed."""
        source = self._source(unit)
        made = Path(self.build_temp, unit).with_suffix(".o")
        headers, used = made.with_suffix(".d"), made.with_suffix(".txt")
        line = shlex.join(command)
        if made.exists() and used.exists() and used.read_text() == line:
            needed = headers.read_text().replace("\\\n", " ").split()[1:]
            times = [path.stat().st_mtime if path.exists() else 2e9 for path in map(Path, needed)]
            if max(times) < made.stat().st_mtime:
                return str(made)
        made.parent.mkdir(parents=True, exist_ok=True)
        used.unlink(missing_ok=True)
        print(f"fused_resnet: compiling {unit}\n", end="", flush=True)  # in one piece
        _run([*CCACHE, *command, "-MMD", "-MF", str(headers), "-c", source, "-o", str(made)])
        used.write_text(line)
        return str(made)


def _run(command: list[str]) -> None:
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"fused_resnet: this command failed: {shlex.join(command)}")
