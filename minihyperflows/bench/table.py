"""The record of ``minihyperflows bench`` as a table to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minihyperflows.bench.contenders import OURS, torch_name

# What the contenders on a GPU are called.
GPU_TITLES = {
    "ours": "here, float16",
    "ours_float32": "here, float32",
    "torch_amp_contiguous": "PyTorch AMP, NCHW",
    "torch_amp_channels_last": "PyTorch AMP, channels_last",
    "torch_graph": "PyTorch AMP, CUDA graph",
    "torch_compile": "PyTorch AMP, compiled",
    "torch_float32": "PyTorch float32",
}

MIB = 1 << 20
OUR_TITLES = ("ours", "memory (peak)")
TITLES = ("ours", "PyTorch", "its format", "speed-up", "memory (peak)", "PyTorch's")
BUSY = 0.5  # load per core before the measurement from which on its figures are suspect


def table(record: dict[str, Any]) -> str:
    """What was measured on, and a row for each network and each way to compute a convolution."""
    titles = OUR_TITLES if record["versions"]["torch"] is None else TITLES
    lines = [_machine(record), *_notes(record), "", _line("one pruning step", titles)]
    lines += [_network_line(entry) for entry in record["networks"]]
    if record["layers"]:
        lines += ["", f"{'convolution':<40}{'':<24}{'forward':>23}{'backward':>23}"]
    for entry in record["layers"]:
        lines += _layer_lines(entry)
    return "\n".join(lines)


def _machine(record: dict[str, Any]) -> str:
    libraries = [
        f"{b['library']} {b['version']} for {b['core_type']}, {b['threads']} threads"
        for b in record["blas"]
    ]
    versions = [f"{n} {record['versions'][n]}" for n in ("numpy", "torch") if record["versions"][n]]
    return "; ".join([f"{record['cpu']}, {record['cores']} cores", *libraries, *versions])


def _notes(record: dict[str, Any]) -> list[str]:
    notes = []
    if core_type := record["environment"]["OPENBLAS_CORETYPE"]:
        notes.append(
            f"warning: OPENBLAS_CORETYPE={core_type} is set, which can halve the speed of NumPy's "
            "matrix products: unset it to measure"
        )
    if (record["load"] or 0) > BUSY * record["cores"]:
        notes.append(
            f"warning: the machine is busy (load {record['load']:.1f} on {record['cores']} cores): "
            "expect noise"
        )
    if record["versions"]["torch"] is None and "--no-torch" not in record["command"]:
        notes.append("PyTorch is not installed: pip install torch to compare with it")
    return notes


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<32}" + "".join(f"{cell:>16}" for cell in cells)


def _network_line(entry: dict[str, Any]) -> str:
    name = f"{entry['network']}, batch {entry['batch']}"
    if entry["width"] not in (None, 1):
        name = f"{name}, width {entry['width']:g}"
    milliseconds, memory, rival = entry["milliseconds"], entry["memory"], entry["torch_format"]
    time, size = f"{milliseconds[OURS]:.2f} ms", _mebibytes(memory[OURS])
    if rival is None:
        return _line(name, [time, size])
    their_time = f"{milliseconds[torch_name(rival)]:.2f} ms"
    their_size = _mebibytes(memory[torch_name(rival)])
    return _line(name, [time, their_time, rival, f"{entry['ratio']:.2f}x", size, their_size])


def _mebibytes(memory: dict[str, int] | None) -> str:
    if memory is None:
        return "unknown"
    return f"{memory['increase'] / MIB:.0f} ({memory['peak'] / MIB:.0f}) MiB"


def _layer_lines(entry: dict[str, Any]) -> list[str]:
    """A row for each of our ways, the chosen one first, then PyTorch's faster format."""
    ours = [name for name in entry["times"] if not name.startswith(torch_name(""))]
    ours.sort(key=lambda name: name != entry["way"])
    rivals = [torch_name(entry["torch_format"])] if entry["torch_format"] else []
    titles = [_layer_title(entry), *[""] * (len(ours) + len(rivals) - 1)]
    return [
        f"{title:<40}{name + (' (chosen)' if name == entry['way'] else ''):<24}"
        f"{_speed(entry['times'][name]['forward'])}{_speed(entry['times'][name]['backward'])}"
        for title, name in zip(titles, [*ours, *rivals], strict=True)
    ]


def _layer_title(entry: dict[str, Any]) -> str:
    _, rows, columns, channels = entry["images"]
    out, height, width, _ = entry["weight"]
    stride = f" / {entry['stride'][0]}" if entry["stride"] != [1, 1] else ""
    return f"{entry['network']} {rows}x{columns}x{channels}, {height}x{width}{stride} -> {out}"


def _speed(times: dict[str, float]) -> str:
    return f"{times['milliseconds']:>9.2f} ms{times['gflops']:>6.0f} GF/s"


# -- on a GPU ------------------------------------------------------------------------------------


def gpu_table(record: dict[str, Any]) -> str:
    """What was measured on, and a row for each contender on each network."""
    versions, gpu = record["versions"], record["gpu"]
    names = ("numpy", "cupy", "torch", "cudnn")
    known = [f"{n} {versions[n]}" for n in names if versions.get(n)]
    driver = f"driver {gpu['driver']}" if gpu["driver"] else versions["cuda"]
    lines = ["; ".join([gpu["name"], driver, *known])]
    if versions["torch"] is None and "--no-torch" not in record["command"]:
        lines.append("PyTorch is not installed: pip install torch to compare with it")
    for entry in record["networks"]:
        width = f", width {entry['width']:g}" if entry["width"] != 1 else ""
        title = f"{entry['network']}, batch {entry['batch']}{width}"
        titles = ("a step", f"{entry['images']:,} images", "evaluation", "time / ours")
        lines += ["", f"{title:<32}" + "".join(f"{t:>16}" for t in (*titles, "memory", "start"))]
        lines += [_contender_line(name, entry) for name in entry["contenders"]]
    return "\n".join(lines)


def _contender_line(name: str, entry: dict[str, Any]) -> str:
    about = entry["contenders"][name]
    title = GPU_TITLES.get(name, name)
    if "error" in about:
        return f"{title:<32}  {about['error']}"
    steps, epochs = (entry.get(part, {"medians": {}, "ratios": {}}) for part in ("steps", "epochs"))
    step, epoch = (part["medians"].get(name, {}) for part in (steps, epochs))
    ratio = epochs["ratios"].get(name, steps["ratios"].get(name))
    cells = [
        f"{step['milliseconds']:.2f} ms" if step else "",
        f"{epoch['seconds']:.2f} s" if epoch else "",
        f"{epoch['evaluation']:.2f} s" if epoch else "",
        f"{ratio:.2f}" if ratio else "",
        f"{about['memory'] / MIB:,.0f} MiB" if "memory" in about else "",
        f"{about['preparation']:.1f} s" if "preparation" in about else "",
    ]
    return f"{title:<32}" + "".join(f"{cell:>16}" for cell in cells)
