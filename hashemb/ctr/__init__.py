"""CTR modelling on hashemb's public API: readers, models, metrics, progressive validation."""
