"""The choice of the fastest backend for a call: timing, the cache file, the shipped defaults."""
