"""What is kept on disk: verified files by content, and what decides whether they fit."""
