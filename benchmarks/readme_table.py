"""Writes what README.md and docs/ show of results/: tables between their markers, and a picture.

python benchmarks/readme_table.py [--check]    with --check: exit code 1 if a file would change
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from readme_picture import picture

from fused_resnet.bench import results
from fused_resnet.bench.coverage import Coverage, total

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOTHING = "No results have been recorded yet; `make bench` records them."
NAMES = {
    "eager": "PyTorch",
    "channels_last": "PyTorch in channels_last",
    "compile": "torch.compile",
    "jit": "torch.jit.freeze",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ncnn": "ncnn",
}
#: The file of README's picture.
PICTURED = RESULTS / "cpu-amd-epyc-family-26-model-2-2-threads.json"
#: The file of README's table of training.
TRAINED = RESULTS / "training-cpu-amd-epyc-family-25-model-17-2-threads.json"
#: Training steps of few and of many images.
BATCHES = RESULTS / "training-batches-cpu-amd-epyc-family-25-model-17-2-threads.json"
PICTURE = "docs/images/images-per-second.svg"
OURS = {"frozen": "`freeze`", "frozen_direct": "`freeze(winograd=False)`", "fused": "`fuse`"}


def section(files: Sequence[tuple[str, Sequence[results.Row]]]) -> str:
    """Markdown: one table a device, a line for each network, batch, number of threads and dtype."""
    devices: dict[str, list[tuple[str, Sequence[results.Row]]]] = {}
    for name, rows in files:
        devices.setdefault(rows[0]["device"], []).append((name, rows))
    return "\n\n".join(_table(device, own) for device, own in devices.items()) or NOTHING


def _table(device: str, files: Sequence[tuple[str, Sequence[results.Row]]]) -> str:
    rows = [row for _, own in files for row in own]
    versions = rows[0]["versions"]
    named = ("torch", "onnxruntime", "openvino", "ncnn")
    software = ", ".join(f"{n} {versions[n]}" for n in named if versions.get(n))
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    links = ", ".join(f"[{name}](results/{name})" for name, _ in files)
    peers = dict.fromkeys(row["provider"] for row in rows if row["provider"] not in OURS)
    cases: dict[tuple[str, str, int, int, int], dict[str, results.Row]] = {}
    for row in rows:
        keys = ("dtype", "subject", "size", "threads", "batch")
        key: Any = tuple(row[k] for k in keys)
        cases.setdefault(key, {})[row["provider"]] = row
    lines = [
        f"{device}; {software}; fused_resnet {versions['fused_resnet']} at {commits}. Images per "
        "second, and in brackets how many times the best other's in the same run; memory is the "
        "most that was resident during inference, in MiB, with PyTorch's libraries, which every "
        f"process had loaded, of `freeze` and of that best one. The others are "
        f"{', '.join(NAMES.get(name, name) for name in peers)}; a run that had fewer says of how "
        f"many the best is the best. All numbers: {links}.",
        "",
        "| | threads | batch | best other | " + " | ".join(OURS.values()) + " | memory |",
        "|---|---:|---:|---|" + "---:|" * (len(OURS) + 1),
    ]
    for (dtype, subject, size, threads, batch), measured in sorted(cases.items(), key=_order):
        asked = [row for provider, row in measured.items() if provider not in OURS]
        others = [row for row in asked if row["status"] == "ok"]
        best = max(others, key=lambda row: row["images_per_s"], default=None)
        other = ""
        if best is not None:
            provider = best["provider"]
            name = NAMES.get(provider, provider)
            among = f" of {len(asked)}" if len(asked) < len(peers) else ""
            other = f"{name}{among}, {best['images_per_s']:.1f}"
        cells = [_cell(measured.get(ours), best) for ours in OURS]
        memory = " / ".join(_memory(row) for row in (measured.get("frozen"), best))
        label = subject + (f", {size}x{size}" if size != 224 else "")
        label += "" if dtype == "float32" else f", {dtype}"
        columns = (label, str(threads), str(batch), other, *cells, memory)
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _order(case: tuple[tuple[str, str, int, int, int], Any]) -> tuple[Any, ...]:
    """float32 first, then networks by the size of their names' numbers, the CIFAR ones last."""
    (dtype, subject, size, threads, batch), _ = case
    return (dtype != "float32", -size, len(subject), subject, threads, batch)


def _cell(row: results.Row | None, best: results.Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    ratio = "" if best is None else f" ({row['images_per_s'] / best['images_per_s']:.2f})"
    return f"{row['images_per_s']:.1f}{ratio}"


def _memory(row: results.Row | None) -> str:
    peak = None if row is None else row.get("peak_mib")
    return "-" if peak is None else f"{peak:.0f}"


def training_section(files: Sequence[tuple[str, Sequence[results.Row]]]) -> str:
    """Markdown: one table per device, one line per network, batch, number of threads and dtype."""
    devices: dict[str, list[tuple[str, Sequence[results.Row]]]] = {}
    for name, rows in files:
        devices.setdefault(rows[0]["device"], []).append((name, rows))
    return "\n\n".join(_training_table(d, own) for d, own in devices.items()) or NOTHING


def _training_table(device: str, files: Sequence[tuple[str, Sequence[results.Row]]]) -> str:
    rows = [row for _, own in files for row in own]
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    links = ", ".join(f"[{name}](results/{name})" for name, _ in files)
    lines = [
        f"{device}; torch {rows[0]['versions']['torch']}; fused_resnet at {commits}. Images per "
        "second of whole training steps, and in brackets how many times those of the best other in "
        "the same run; memory is the peak beyond the network, the batch and libraries, in MiB, "
        f"beside the least of the others. bfloat16 is autocast. All numbers: {links}.",
        "",
        "| | threads | batch | best other | `fuse` | memory | `fuse(recompute=True)` | memory |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for (dtype, subject, size, threads, batch), measured in _trained(rows):
        best, least = _best_other(measured)
        name = "" if best is None else NAMES.get(best["provider"], best["provider"])
        other = "" if best is None else f"{name}, {best['images_per_s']:.1f}"
        cells = []
        for provider in ("fused", "fused_recompute"):
            row = measured.get(provider)
            cells += [_cell(row, best), "" if row is None else _beside(row["added_mib"], least)]
        label = subject + (f", {size}x{size}" if size != 224 else "")
        label += "" if dtype == "float32" else f", {dtype}"
        lines.append(f"| {' | '.join((label, str(threads), str(batch), other, *cells))} |")
    return "\n".join(lines)


def _trained(rows: Sequence[results.Row]) -> list[tuple[Any, dict[str, results.Row]]]:
    """The rows of each case by provider, in order."""
    cases: dict[Any, dict[str, results.Row]] = {}
    for row in rows:
        keys = ("dtype", "subject", "size", "threads", "batch")
        cases.setdefault(tuple(row[k] for k in keys), {})[row["provider"]] = row
    return sorted(cases.items(), key=_order)


def _best_other(measured: dict[str, results.Row]) -> tuple[results.Row | None, float | None]:
    """The fastest of the others, and the least memory of any of them."""
    others = [
        row
        for provider, row in measured.items()
        if not provider.startswith("fused") and row["status"] == "ok"
    ]
    best = max(others, key=lambda row: row["images_per_s"], default=None)
    return best, min((row["added_mib"] for row in others if row["added_mib"]), default=None)


def training_summary(rows: Sequence[results.Row]) -> str:
    """README's table of training: float32, the largest batch of each network.

    Args:
        rows: Of one device, number of threads and dtype.
    """
    lines = [
        f"| training, {rows[0]['threads']} threads of {rows[0]['device']} | batch | images/s "
        "| times the faster of channels_last and `torch.compile` | of their least memory |",
        "|---|---:|---:|---:|---:|",
    ]
    largest: dict[str, str] = {}
    for (_, subject, _, _, batch), measured in _trained(rows):
        (best, least), fused = _best_other(measured), measured["fused"]
        assert best is not None
        assert least is not None
        times = fused["images_per_s"] / best["images_per_s"]
        share = fused["added_mib"] / least
        largest[subject] = (
            f"| {subject} | {batch} | {fused['images_per_s']:.1f} | {times:.2f} | {share:.2f} |"
        )
    return "\n".join([*lines, *largest.values()])


def batches_section(name: str, rows: Sequence[results.Row]) -> str:
    """Markdown: how many times as fast as PyTorch a network trains, by its number of images.

    Args:
        name: Name of the file.
        rows: Of one device, number of threads and dtype; of ``channels_last`` and ``fused``.
    """
    networks: dict[str, dict[int, str]] = {}
    for (_, subject, _, _, batch), measured in _trained(rows):
        times = measured["fused"]["images_per_s"] / measured["channels_last"]["images_per_s"]
        networks.setdefault(subject, {})[batch] = f"{times:.2f}"
    batches = sorted({batch for found in networks.values() for batch in found})
    lines = [
        "Images per second of `fuse` in training steps, as a multiple of PyTorch's in "
        f"channels_last, by batch size; {rows[0]['threads']} threads of {rows[0]['device']}. All "
        f"numbers: [{name}](results/{name}).",
        "",
        f"| | {' | '.join(map(str, batches))} |",
        f"|---|{'---:|' * len(batches)}",
    ]
    for subject, found in networks.items():
        cells = [found.get(batch, "") for batch in batches]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside(added: float | None, least: float | None) -> str:
    if added is None:
        return "-"
    return f"{added:.0f}" + ("" if least is None else f" / {least:.0f}")


def coverage_section(document: dict[str, Any]) -> str:
    """Markdown: a line for each family in a file of ``fused-resnet coverage --json``."""
    versions = document["versions"]
    named = ("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch")
    software = ", ".join(f"{n} {versions[n]}" for n in named if versions.get(n))
    families: dict[str, list[Coverage]] = {}
    for row in document["networks"]:
        keys = ("groups", "fused", "left", "operations")
        families.setdefault(row["family"], []).append(Coverage(*(row[key] for key in keys)))
    lines = [
        f"`{document['command']}`, fused_resnet at {document['commit']}; {software}.",
        "",
        "| | networks | groups | fused | why not the rest |",
        "|---|---:|---:|---:|---|",
    ]
    for family, own in families.items():
        counts = total(own)
        why = "; ".join(f"{times}: {reason}" for reason, times in counts.left.items())
        lines.append(f"| {family} | {len(own)} | {counts.groups} | {counts.fused} | {why} |")
    return "\n".join(lines)


def summary(files: Sequence[tuple[str, Sequence[results.Row]]]) -> str:
    """A sentence: the ratios of ``freeze`` to the best other provider over all cases of a dtype."""
    ratios: dict[str, list[float]] = {}
    names: dict[str, str] = {}
    for _, rows in files:
        cases: dict[Any, dict[str, results.Row]] = {}
        for row in rows:
            if row["status"] == "ok":
                key = tuple(row[k] for k in ("dtype", "subject", "size", "threads", "batch"))
                cases.setdefault(key, {})[row["provider"]] = row
        for (dtype, *_), measured in cases.items():
            others = [row for name, row in measured.items() if name not in OURS]
            if "frozen" in measured and others:
                best = max(others, key=lambda row: row["images_per_s"])
                ratio = measured["frozen"]["images_per_s"] / best["images_per_s"]
                ratios.setdefault(dtype, []).append(ratio)
                names[NAMES.get(best["provider"], best["provider"])] = ""
    if not ratios:
        return NOTHING
    parts = []
    for dtype, found in sorted(ratios.items(), key=lambda item: item[0] != "float32"):
        slower = sum(ratio < 1 for ratio in found)
        parts.append(
            f"in {dtype} {min(found):.2f} to {max(found):.2f} times, median "
            f"{statistics.median(found):.2f} ({len(found)} cases, {slower} of them slower)"
        )
    return (
        "Images per second of `freeze`, as a multiple of the fastest other runtime's in the same "
        f"run ({', '.join(names)}): {'; '.join(parts)}."
    )


def replaced(text: str, name: str, new: str) -> str:
    """The text with what stands between the two markers of that name replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"expected the markers {begin} and {end}")
    return f"{head}{begin}\n{new}\n{end}{tail}"


def sections() -> dict[str, str]:
    """What belongs between the markers, by their names."""
    timed = [(f.name, results.load(f)) for f in sorted(RESULTS.glob("cpu-*.json"))]
    trained = [(f.name, results.load(f)) for f in sorted(RESULTS.glob("training-cpu-*.json"))]
    return {
        "summary": summary(timed),
        "benchmarks": section(timed),
        "training": training_section(trained),
        "training-summary": training_summary(results.load(TRAINED)),
        "batches": batches_section(BATCHES.name, results.load(BATCHES)),
        "coverage": coverage_section(json.loads((RESULTS / "coverage.json").read_text())),
    }


#: The files with markers, and the names of these.
MARKED = {
    "README.md": ("summary", "training-summary"),
    "docs/index.md": ("summary",),
    "docs/benchmarks.md": ("summary", "benchmarks", "training", "batches"),
    "docs/supported-models.md": ("coverage",),
}


def written() -> dict[str, str]:
    """The files as the recorded results have them, by their paths in the repository."""
    new, texts = sections(), {}
    for path, names in MARKED.items():
        text = (ROOT / path).read_text()
        for name in names:
            text = replaced(text, name, new[name])
        texts[path] = text
    return {**texts, PICTURE: picture(results.load(PICTURED))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    texts = written()
    old = {path: (ROOT / path).read_text() for path in texts if (ROOT / path).exists()}
    if arguments.check:
        return int(texts != old)
    for path, text in texts.items():
        (ROOT / path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
