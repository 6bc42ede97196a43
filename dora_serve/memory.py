"""How much memory there is, asked before something large is begun: the system's answer to too much is to kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can take without swapping: of the machine, and of the control group that it is in.

    None where the system does not say (it is not Linux). root: of /proc and /sys.
    """
    limits = [limit for limit in (_of_machine(root), *_of_groups(root)) if limit is not None]
    return max(0, min(limits)) if limits else None


def _of_machine(root: Path) -> int | None:
    found = [line.split() for line in _lines(root / "proc/meminfo") if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _of_groups(root: Path) -> Iterator[int]:
    """What is left of the limit of each group around the process, of either version of control groups."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, reclaimable = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, reclaimable = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's, of which only the container's own group is to be seen.
        parts = Path(path.strip().lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                # Cached files count as used, and go when memory is asked for.
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                yield most - taken + int(stat.get(reclaimable, 0))


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max" is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
