"""Header -> Detection: what a file is, why, and what else it could be."""
