"""How fast it is, and against what: see README.md beside this file."""
