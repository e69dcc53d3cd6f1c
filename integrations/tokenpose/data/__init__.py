"""People in images: annotation files, views of a person, crops for a network."""
