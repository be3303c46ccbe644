"""What can be watched: the stages of a compilation as files, torch's structured trace, steps on a terminal."""
