"""What a run is made of, and nobody edits: a run is refused where this differs from its session's start."""
