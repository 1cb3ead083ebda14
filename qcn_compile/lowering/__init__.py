"""From the final graph to an artifact: shape buckets, schedule, memory plan, packed weights."""
