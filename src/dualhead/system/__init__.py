"""The machine: devices, arithmetic, processes, files."""
