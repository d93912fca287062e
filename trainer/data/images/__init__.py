"""Image files: listing, decoding, and packs of decoded images."""
