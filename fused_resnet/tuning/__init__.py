"""The fastest backend for a call: timing, the cache file, and the shipped table of defaults."""
