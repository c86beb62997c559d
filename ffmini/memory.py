"""How much memory the machine has to give."""

from __future__ import annotations

from .errors import DeviceError


def available_memory() -> int:
    """Bytes of system memory that can be taken without swapping (MemAvailable)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise DeviceError("/proc/meminfo: MemAvailable expected, not found")
