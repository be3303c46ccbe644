"""What is kept on disk: compiled pieces by their content, files that are verified before they are used, and what decides whether they fit. Never unpickles or runs what it keeps."""
