"""Other people's training commands, tried on a CPU: read, shrunk, run with and without memories, judged, tabled."""
