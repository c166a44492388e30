"""Batch runs: every study through Papermill at a preset, rendered to HTML, with an index of all claims.

``python -m lib.reproduce --preset quick`` resumes: a study whose notebook, parameters, data and code are those of its
last good run is left alone, and inside a study every finished training run comes from the cache.
"""

import sys

# jsonschema would build its parsers of international addresses, for seconds; no notebook's schema asks for them.
sys.modules.setdefault("rfc3987_syntax", None)

from lib.reproduce.batch import reproduce
from lib.reproduce.index import write_index
from lib.reproduce.page import render
from lib.reproduce.plan import prepare, preset_parameters, presets, up_to_date_key
from lib.reproduce.run import Run, last_run, run_study

__all__ = [
    "Run",
    "last_run",
    "prepare",
    "preset_parameters",
    "presets",
    "render",
    "reproduce",
    "run_study",
    "up_to_date_key",
    "write_index",
]
