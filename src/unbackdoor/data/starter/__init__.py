"""Bundled sets written for this project: instructions, sentiment sentences, requests to decline, unwanted openings.

They make the demo, the tests and a first try possible without a download; see README.md beside this file. Read them
with `unbackdoor.data.sources.read("starter:instructions")` and `read_lines("starter:insult_typical")`.
"""
