"""Generate impressions whose click probabilities are known."""

from hashemb.ctr.synthetic.stream import Impressions, ImpressionStream, truth_path

__all__ = ["ImpressionStream", "Impressions", "truth_path"]
