"""The parts of scripts/compare: options, the job, the table, the picture."""
