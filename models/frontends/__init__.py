"""Front ends that read what others captured or exported, each into an `OpGraph`."""
