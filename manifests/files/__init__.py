"""Files that may come from anywhere: opening paths and URLs, caching, and reading weights as data, never as code."""
