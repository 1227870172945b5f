"""Components by name, and the sections of a recipe that hold them."""
