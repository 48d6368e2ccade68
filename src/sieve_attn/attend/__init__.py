"""Stage 4: query, key, value and a selection to output and log-sum-exp."""
