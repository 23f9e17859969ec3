"""What bytes and names each loader wants; one file per format."""
