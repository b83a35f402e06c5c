"""What a run leaves on disk. Nothing here ever imports torch."""
