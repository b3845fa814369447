"""MSA-1, what both sides share: primitives, roster, encoding, message formats, the seam to a transport."""
