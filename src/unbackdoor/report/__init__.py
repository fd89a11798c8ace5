"""Reports: tables, plots, HTML and Markdown of a run folder, as a pure function of its files."""
