"""What a run is made of. Nobody edits it during a session: a run is refused where it differs from the session's start."""
