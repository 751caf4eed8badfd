"""Tools beside the stages, run from the repository's root: python -m tools.NAME --help."""
