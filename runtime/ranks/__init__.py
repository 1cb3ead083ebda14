"""One process a rank: rank 0 schedules, samples and talks to users; the others run every step it runs."""
