"""Sample files that come with the package."""
