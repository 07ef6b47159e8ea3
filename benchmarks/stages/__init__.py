"""The stages of ``scripts/gpu_check``, a file each: ``items(context)`` yields ``(name, work)`` in order of value."""
