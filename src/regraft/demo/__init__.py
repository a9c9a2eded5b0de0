"""Demo: the embedded pair, sampling from it, and the main job carried out on it."""
