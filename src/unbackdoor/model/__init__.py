"""Models: specs, safe loading, templates, generation, saving."""
