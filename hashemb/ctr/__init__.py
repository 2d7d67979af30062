"""Click-through-rate models on hashemb's public API: readers, models, metrics and progressive validation."""
